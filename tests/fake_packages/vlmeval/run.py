"""The command: every question of a data set is asked, the answers are written to a file, which is scored."""

import argparse
import json
import os
from pathlib import Path

from vlmeval.config import supported_VLM
from vlmeval.dataset import build_dataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--work-dir")
    parser.add_argument("--judge")
    arguments = parser.parse_args()
    for model_name in arguments.model:
        for dataset_name in arguments.data:
            dataset, model = build_dataset(dataset_name), supported_VLM[model_name]()
            model.set_dump_image(dataset.dump_image)
            data = dataset.data
            data["prediction"] = [
                model.generate(message=dataset.build_prompt(data.iloc[number]), dataset=dataset_name)
                for number in range(len(data))
            ]
            folder = Path(arguments.work_dir) / model_name
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{model_name}_{dataset_name}.{os.environ['PRED_FORMAT']}"
            if file.suffix == ".tsv":
                data.to_csv(file, sep="\t", index=False, quoting=1)
            else:
                file.write_text(json.dumps(data.to_dict("records")))
            judge = {"nproc": 4, "verbose": False} | ({"model": arguments.judge} if arguments.judge else {})
            print(dataset.evaluate(str(file), **judge))


if __name__ == "__main__":
    main()
