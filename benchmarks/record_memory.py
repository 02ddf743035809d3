"""Memory of the worker processes that read a large file of records, over an epoch in random order.

    python -m benchmarks.record_memory                       # a JSON list of 300,000 records, 250 MB in /tmp
    python -m benchmarks.record_memory --format parquet      # the same as parquet; needs idavlm[data]

Private memory is what a worker does not share with the main process. It must not grow with the number of records that
the worker has read.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from torch.utils.data import DataLoader, get_worker_info

from idavlm import RecordDataset
from idavlm.utils import describe_machine, markdown_table

_BATCH_SIZE = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--format", choices=["json", "parquet"], default="json")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"records.{arguments.format}")
        write(path, arguments.records)
        start = time.process_time()
        data = RecordDataset(path, reader="llava", encode=number_of_parts)
        opened = (time.process_time() - start) / len(data)
        start = time.process_time()
        accessed = [data[index] for index in range(0, len(data), max(1, len(data) // 2000))]
        access = (time.process_time() - start) / len(accessed)
        loader = DataLoader(
            data, batch_size=_BATCH_SIZE, shuffle=True, num_workers=arguments.workers, collate_fn=private_memory
        )
        memory = [[] for _ in range(arguments.workers)]
        for worker, kilobytes in loader:
            memory[worker].append(kilobytes // 1024)
        size = path.stat().st_size / 2**20
    print(describe_machine())
    print(f"{len(data)} records, {size:.0f} MB")
    print(f"CPU time per record: {opened * 1e6:.0f} us to check it at opening, {access * 1e6:.0f} us to read it")
    rows = [
        [worker, *(values[round(place * (len(values) - 1))] for place in (0, 0.25, 0.5, 0.75, 1)), max(values)]
        for worker, values in enumerate(memory)
    ]
    header = ["worker", "MB at the start", "at 25 %", "at 50 %", "at 75 %", "at the end", "largest"]
    print(markdown_table(header, rows))


def write(path: Path, count: int) -> None:
    """Write ``count`` records of about 800 characters."""
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_generator(records, gen_kwargs={"count": count}).to_parquet(path)
        return
    with path.open("w") as file:
        file.write("[")
        for number, record in enumerate(records(count)):
            file.write((",\n" if number else "") + json.dumps(record))
        file.write("]")


def records(count: int):
    """Records of LLaVA's format."""
    for number in range(count):
        question, answer = "<image>\nWhat is shown? " + "word " * 60, "A cat. " + "text " * 80
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        yield {"id": str(number), "image": f"{number % 100}.jpg", "conversations": turns}


def number_of_parts(sample) -> dict[str, int]:
    """Stands for the processor."""
    return {"parts": len(sample.messages[0].content)}


def private_memory(batch: list) -> tuple[int, int]:
    """Number of this worker, and kilobytes that it does not share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return get_worker_info().id, kilobytes


if __name__ == "__main__":
    main()
