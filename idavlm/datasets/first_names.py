"""First names for records. They are drawn anew for every record, so that a name says nothing about a look."""

NAMES: tuple[str, ...] = (
    *("Ada", "Alan", "Alice", "Amir", "Amy", "Anna", "Anton", "Astrid", "Bella", "Ben", "Boris", "Carl", "Carla"),
    *("Chloe", "Clara", "Daniel", "David", "Diego", "Dora", "Edith", "Elena", "Eli", "Emil", "Emma", "Erik"),
    *("Esther", "Eva", "Felix", "Fiona", "Frank", "Freya", "George", "Grace", "Greta", "Hana", "Hannah", "Hassan"),
    *("Helen", "Henry", "Hugo", "Ida", "Ines", "Ingrid", "Iris", "Isaac", "Ivan", "Jack", "Jana", "Jane", "Jasper"),
    *("John", "Jonas", "Julia", "Kai", "Karim", "Kate", "Klara", "Lars", "Laura", "Lena", "Leo", "Liam", "Lina"),
    *("Lucas", "Lucy", "Luis", "Maria", "Mark", "Marta", "Max", "Maya", "Mia", "Mila", "Nadia", "Nico", "Nina"),
    *("Noah", "Nora", "Olga", "Oliver", "Omar", "Oscar", "Otto", "Paul", "Pia", "Rita", "Robin", "Rosa", "Ruth"),
    *("Sam", "Sara", "Simon", "Sofia", "Stella", "Tara", "Theo", "Tina", "Tom", "Uma", "Vera", "Victor", "Wanda"),
    *(
        "Yara",
        "Yuki",
        "Zoe",
    ),
)
