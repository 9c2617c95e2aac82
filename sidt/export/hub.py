"""The Hugging Face hub: checkpoints come from it and go to it, by ``huggingface_hub`` and its own login.

No token is taken, kept or shown here: ``hf auth login`` stores one, or the variable ``HF_TOKEN`` has it.
"""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sidt.errors import InputError

_NETWORK = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)  # the HTTP library's own, and OSError
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PREFIX = re.compile("hf[-_]hub:")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OFFLINE = "is there a network (HF_HUB_OFFLINE, HF_ENDPOINT)?"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def repository_in(source: str) -> tuple[str, str | None] | None:
    """The repository and the revision that a text names, ``hf-hub:OWNER/NAME@REVISION`` or the like.

    The prefix and the revision may be left out. ``None`` if it is no such name.

    Raises:
        InputError: it has the prefix, but is not of that form.
    """
    name, _, revision = _PREFIX.sub("", source, count=1).partition("@")
    if _REPOSITORY.fullmatch(name):
        return name, revision or None
    if _PREFIX.match(source):
        raise InputError(f"{source!r} is no repository of the hub; write hf-hub:OWNER/NAME")
    return None


def download(repository: str, revision: str | None, files: tuple[str, ...], what: str) -> Path:
    """Files of a repository, all of one revision, in the hub's cache.

    Args:
        repository: ``OWNER/NAME``.
        revision: a branch, tag or commit; None: the main branch.
        files: their names.
        what: what a repository with these files is, for the message.

    Returns:
        The folder that has them.

    Raises:
        InputError: there is no such repository, revision or file, or no network.
    """
    with one_line(repository, what):
        try:  # asked first, since a download tries again for half a minute where there is no network
            HfApi(library_name="sidt").model_info(repository, revision=revision)
            cached = False
        except HfHubHTTPError:
            raise
        except _NETWORK:
            cached = True
        first = Path(
            hf_hub_download(repository, files[0], revision=revision, library_name="sidt", local_files_only=cached)
        )
        commit = first.parent.name
        for name in files[1:]:
            hf_hub_download(repository, name, revision=commit, library_name="sidt", local_files_only=cached)
    return first.parent


def ask_for_weights(repository: str, what: str) -> None:
    """Ask for a repository once, unless weights of it are in the cache: who downloads without a network waits long.

    Raises:
        InputError: there is no such repository, or no network.
    """
    if not any(isinstance(try_to_load_from_cache(repository, name), str) for name in _WEIGHTS):
        with one_line(repository, what):
            HfApi(library_name="sidt").model_info(repository)


def check_name(repository: str) -> None:
    """Refuse what is no ``OWNER/NAME``."""
    if _REPOSITORY.fullmatch(repository) is None:
        raise InputError(f"{repository!r} is no name of a repository; write OWNER/NAME")


def upload(repository: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Put files into a repository in one commit, and make the repository if it is not there.

    Args:
        repository: ``OWNER/NAME``.
        files: by name in the repository.
        private: whether it must be private.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        InputError: no token, no network, a name that is none, a refusal of the hub, or a repository that is public
            and should not be.
    """
    check_name(repository)
    if get_token() is None:
        raise InputError(f"the hub takes uploads with a token alone; {_LOGIN}")
    operations = [CommitOperationAdd(name, str(c) if isinstance(c, Path) else c) for name, c in files.items()]
    with one_line(repository, "repository that can be written"):
        api = HfApi(library_name="sidt")
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        if private and not api.model_info(repository).private:  # one that is there stays as it is
            raise InputError(
                f"{repository} is there and is public; make it private on the hub, or push without --private"
            )
        try:
            api.create_commit(repository, operations, commit_message=message)
        except HfHubHTTPError:
            raise
        except (ValueError, RuntimeError) as error:  # of the card, of an upload
            raise InputError(f"the hub refuses what goes to {repository}: {_reason(error)}") from None
    return address


@contextmanager
def one_line(repository: str, what: str) -> Iterator[None]:
    """Turn what the hub or the network answers into an InputError.

    Args:
        repository: the one that is read or written.
        what: what it should be, for the message.
    """
    try:
        yield
    except InputError:
        raise
    except LocalEntryNotFoundError:
        raise InputError(f"cannot reach the hub for {repository}, and the cache does not have it; {_OFFLINE}") from None
    except RevisionNotFoundError:
        raise InputError(f"{repository} has no such revision on the hub; leave it out for the main branch") from None
    except EntryNotFoundError as error:
        missing = re.search(r"[\w-]+\.(json|safetensors|yaml)", str(error).rpartition("/resolve/")[2])
        file = missing[0] if missing else "some of the files"
        raise InputError(f"{repository} on the hub is no {what}: it has no {file}") from None
    except RepositoryNotFoundError:
        raise InputError(f"the hub has no {repository}, or it is private or gated; if it is yours, {_LOGIN}") from None
    except HFValidationError:
        raise InputError(f"{repository!r} is no name of a repository; write OWNER/NAME") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"the hub does not let this token write to {repository} ({status}); {_LOGIN}, with one that may write"
            ) from None
        raise InputError(f"the hub answers {status} for {repository}: {_reason(error)}") from None
    except _NETWORK as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise InputError(f"cannot keep what the hub has of {repository}: {_reason(error)}; set HF_HOME") from None
        raise InputError(f"cannot reach the hub for {repository}: {_reason(error)}; {_OFFLINE}") from None


def _reason(error: Exception) -> str:
    """The message of an error, on one line and without the token."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    token = get_token()
    return text.replace(token, "...") if token else text
