"""Datasets on the Hugging Face hub, streamed: only as much is downloaded as the token budget needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from linearize.data.document import Row
from linearize.errors import DataError

log = logging.getLogger(__name__)

BUFFER = 1000
"""Documents in the shuffle buffer of a stream: all of them are downloaded before the first one comes out."""


def open_stream(name: str, *, split: str, seed: int | None) -> tuple[Any, list[str] | None]:
    """A streaming dataset and its columns (None where they are not known before reading).

    Args:
        name: ``owner/name`` or ``owner/name:config``.
        split: "validation" falls back on "test" where the dataset has only that.
        seed: shuffles within a buffer; None keeps the order.

    Raises:
        DataError: no such dataset, configuration or split, or no network.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    repo, _, config = name.partition(":")
    log.info("streaming '%s' from the Hugging Face hub", name)
    try:
        stream = _open(load_dataset, repo, config or None, split)
    except DatasetNotFoundError as error:
        raise DataError(
            f"data source '{name}' is neither a file or folder here nor a dataset on the Hugging Face hub "
            f"that can be read ({_first_line(error)}); check the name, or give a local file"
        ) from error
    except (ConnectionError, TimeoutError, OSError) as error:
        raise DataError(
            f"data source '{name}' is no file or folder here, and the Hugging Face hub cannot be reached "
            f"({_first_line(error)}); connect to a network, or give a local file"
        ) from error
    except (ValueError, RuntimeError) as error:  # unknown split, missing configuration, loading scripts
        raise DataError(
            f"hub dataset '{name}', split '{split}', cannot be opened ({_first_line(error)}); set "
            "data.split, or write owner/name:config"
        ) from error
    return (stream if seed is None else stream.shuffle(seed=seed, buffer_size=BUFFER)), stream.column_names


def revision(name: str) -> str | None:
    """The commit that a dataset's files are of now, or None where the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(name.partition(":")[0], timeout=10).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, RuntimeError):
        return None


def rows(stream: Any, name: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of a stream, one by one. Raises DataError when the download breaks off, or a file is damaged."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(stream, start=1):
            yield f"row {number}", row
    except (DatasetsError, pa.ArrowException, ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"hub dataset '{name}' cannot be read on ({_first_line(error)}); give another dataset, or a local file"
        ) from error
    except (ConnectionError, TimeoutError, OSError) as error:
        raise DataError(
            f"hub dataset '{name}': the download broke off ({_first_line(error)}); run again"
        ) from error


def _open(load_dataset: Any, repo: str, config: str | None, split: str) -> Any:
    try:
        return load_dataset(repo, config, split=split, streaming=True)
    except ValueError as error:
        if split != "validation" or "split" not in str(error):
            raise
        return load_dataset(repo, config, split="test", streaming=True)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
