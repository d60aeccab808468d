"""Downloads of models from the Hugging Face hub, each file checked once against its hash."""

import contextlib
import hashlib
import re
from pathlib import Path

from gpt2_jax.errors import UserError
from gpt2_jax.interop import weight_files


def download(repo_id: str, revision: str | None = None) -> Path:
    """Brings a model's config and safetensors into the hub's cache.

    HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured. The hub's client looks at nothing but
    a file's length, so what this call brings is hashed before it is used; a check that broke off
    is made next time. What other programs have put into the cache is taken as it is: half a
    gigabyte is not hashed at every start.

    Args:
      repo_id: owner and name of the repository.
      revision: branch, tag or commit; None means the main branch.

    Returns:
      The directory of the files.

    Raises:
      UserError: if the repository or revision does not exist, the hub is out of reach, or a
        file is not the one that the hub announced.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its retries, of some 20 seconds, are told in one error below
    try:
        directory = _fetch(repo_id, "config.json", revision).parent
        try:
            _fetch(repo_id, weight_files.SAFETENSORS, revision)
        except EntryNotFoundError:
            # Large models come in shards. Offline, an absent file is one the cache doesn't have.
            index = _fetch(repo_id, weight_files.SAFETENSORS_INDEX, revision)
            for name in weight_files.shard_names(index):
                _fetch(repo_id, name, revision)
    except RevisionNotFoundError:
        raise UserError(
            f"{repo_id} has no revision {revision!r}; see its page on the hub"
        ) from None
    except GatedRepoError as error:
        raise UserError(
            f"{repo_id} is gated, and the hub answers HTTP {_status(error)}; accept its terms on "
            f"its page and set HF_TOKEN, or give a local copy"
        ) from None
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {repo_id}, or HF_TOKEN may not see it (HTTP {_status(error)}); "
            f"mend either, or give a local copy"
        ) from None
    except EntryNotFoundError as error:
        # The client tells of most refusals as of an empty cache, with the hub's answer as cause.
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        if cause is not None and _status(cause) is not None:
            raise UserError(
                f"{repo_id} is not in the cache and the hub answers HTTP {_status(cause)} "
                f"({_first_line(cause)}); try again later, set HF_TOKEN or HF_ENDPOINT, or give "
                f"a local copy"
            ) from None
        raise UserError(
            f"{repo_id} is not in the cache and the hub cannot be reached or lacks a file "
            f"({_first_line(error)}); connect, set HF_ENDPOINT, or give a local copy"
        ) from None
    except UserError:
        raise
    except Exception as error:
        # The hub's client passes on whatever its transport raises.
        raise UserError(
            f"{repo_id} cannot be downloaded ({_first_line(error)}); "
            f"connect, set HF_ENDPOINT, or give a local copy"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    return directory


def _fetch(repo_id: str, name: str, revision: str | None) -> Path:
    """A file's place in the cache, downloaded and checked first if it is not there.

    An empty file beside it says that the check is not done: after an interrupt, or without an
    answer of the hub, the next call makes up for it and downloads nothing again.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, name, revision=revision)
    file = Path(hf_hub_download(repo_id, name, revision=revision))
    unchecked = file.with_name(f"{file.name}.unchecked")
    is_new = not (isinstance(cached, str) and Path(cached) == file)
    if is_new:
        with contextlib.suppress(OSError):  # a cache for reading only
            unchecked.touch()
    if is_new or unchecked.exists():
        try:
            _check(repo_id, file)
        except UserError:
            _remove(file)
            unchecked.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):
            unchecked.unlink()
    return file


def _check(repo_id: str, file: Path) -> None:
    """Hashes a file.

    Raises:
      UserError: if the hub announced another hash.
    """
    announced = _announced(repo_id, file)
    if re.fullmatch("[0-9a-f]{64}", announced):
        kind = "sha256"
        with file.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
    elif re.fullmatch("[0-9a-f]{40}", announced):
        kind = "git hash"  # files that are too small for LFS
        data_bytes = file.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data_bytes) + data_bytes).hexdigest()
    else:
        return  # a mirror's own tag, which tells nothing of the contents
    if found != announced:
        raise UserError(
            f"{file.name} of {repo_id} arrived with {kind} {found}, but the hub announced "
            f"{announced}; it is not kept, so run this again, and if that does not help try "
            f"another network or HF_ENDPOINT, or give a local copy"
        )


def _announced(repo_id: str, file: Path) -> str:
    """The ETag of a file in the cache: the sha256 of a large file, the git hash of a small one."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if file.is_symlink():
        return file.readlink().name  # the cache names contents by their ETag
    # Where there are no symbolic links the name is lost; the directory's is the commit.
    url = hf_hub_url(repo_id, file.name, revision=file.parent.name)
    return get_hf_file_metadata(url).etag or ""


def _remove(file: Path) -> None:
    """Deletes a file of the cache, and what it links to."""
    while file.is_symlink():
        target = file.parent / file.readlink()
        file.unlink()
        file = target
    file.unlink(missing_ok=True)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of the hub's client tells of, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
