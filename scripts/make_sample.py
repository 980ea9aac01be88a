"""Cut the sample of text that ships in linearize/data/sample from larger corpora; the same input gives the same files.

    python scripts/make_sample.py ../shared/data/text

The input folder holds books.train, books.validation and teacher.train as parquet with columns text and source.
Books are taken only from authors who wrote in English and died before 1931: out of copyright wherever that lasts
for the author's life and up to 95 years, and no translator's rights to mind.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SEED = 0
OUT = Path(__file__).parent.parent / "linearize" / "data" / "sample"
BOOK_CHARACTERS = 22_000
"""Of each training book, cut at a paragraph."""
VALIDATION_CHARACTERS = 15_000
"""Of each validation book."""
TEACHER_SAMPLES = 1_600

_NAMES = """
Abbie Farwell Brown; Adam Smith; Ambrose Bierce; Ann Radcliffe; Anna Sewell; Anne Bronte; Anthony Trollope;
Arthur Conan Doyle; Booker T. Washington; Bram Stoker; Charles Brockden Brown; Charles Dickens; Charlotte
Bronte; Charlotte Dacre; Daniel Defoe; David Hume; Edgar Allan Poe; Edith Nesbit; Edward Bellamy; Edward
Bulwer-Lytton; Edward Everett Hale; Edwin A. Abbott; Elizabeth Gaskell; Elizabeth Stuart Phelps; Emily Bronte;
Erskine Childers; F. Marion Crawford; Fitz James O'Brien; Frances Hodgson Burnett; Francis Parkman; Frank
Norris; Frederick Douglass; Frederick Jackson Turner; George Eliot; George MacDonald; H. Rider Haggard;
Harriet Beecher Stowe; Harriet E. Wilson; Harriet Jacobs; Helen Hunt Jackson; Henry Adams; Henry David
Thoreau; Henry Fielding; Henry James; Herman Melville; Horace Walpole; Horatio Alger; Howard Pyle; J. Sheridan
LeFanu; Jack London; James De Mille; James Fenimore Cooper; Jane Austen; Jerome K. Jerome; John Ruskin; John
Stuart Mill; Joseph Conrad; Kate Chopin; L. Frank Baum; Lafcadio Hearn; Lew Wallace; Lewis Carroll; Louisa May
Alcott; Mark Twain; Mary Elizabeth Braddon; Mary Kingsley; Mary Wollstonecraft; Mary Wollstonecraft Shelley;
Matthew Lewis; Nathaniel Hawthorne; Nellie Bly; Olaudah Equiano; Olive Schreiner; Oscar Wilde; R.D. Blackmore;
R.M. Ballantyne; Ralph Waldo Emerson; Richard Harding Davis; Richard Jefferies; Richard Marsh; Robert Louis
Stevenson; Sabine Baring-Gould; Samuel Butler; Sarah Orne Jewett; Solomon Northup; Stephen Crane; Thomas
Bulfinch; Thomas De Quincey; Thomas Hardy; Thomas Paine; Ulysses S. Grant; Walter Scott; Washington Irving;
Wilkie Collins; William Beckford; William Hope Hodgson; William Makepeace Thackeray; William Morris
"""
AUTHORS = {" ".join(name.split()) for name in _NAMES.split(";")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="folder of the larger corpora")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    rng = np.random.default_rng(SEED)

    train = books(arguments.text / "books.train.parquet", BOOK_CHARACTERS)
    samples = pq.read_table(arguments.text / "teacher.train.parquet").to_pylist()
    train += [samples[i] for i in rng.permutation(len(samples))[:TEACHER_SAMPLES]]
    train = [train[i] for i in rng.permutation(len(train))]
    validation = books(arguments.text / "books.validation.parquet", VALIDATION_CHARACTERS)
    assert not {row["source"] for row in train} & {row["source"] for row in validation}, (
        "a book on both sides"
    )

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", validation)):
        file = arguments.out / f"{name}.parquet"
        write(rows, file)
        characters = sum(len(row["text"]) for row in rows)
        print(f"{file}: {len(rows)} documents, {characters:,} characters, {file.stat().st_size:,} bytes")


def books(file: Path, characters: int) -> list[dict[str, str]]:
    """The start of each excerpt by one of the authors, up to the last paragraph that ends within `characters`."""
    rows = [row for row in pq.read_table(file).to_pylist() if row["source"].split("/")[0] in AUTHORS]
    return [{"text": cut(row["text"], characters), "source": row["source"]} for row in rows]


def cut(text: str, characters: int) -> str:
    end = text.rfind("\n\n", 0, characters)
    return text[:end] if end > 0 else text[:characters]


def write(rows: list[dict[str, str]], file: Path) -> None:
    """As small as parquet gets: one page a column chunk, so that zstd sees it all."""
    table = pa.Table.from_pylist(rows, schema=pa.schema({"text": pa.string(), "source": pa.string()}))
    pq.write_table(
        table,
        file,
        compression="zstd",
        compression_level=22,
        use_dictionary=["source"],
        data_page_size=1 << 26,
    )


if __name__ == "__main__":
    main()
