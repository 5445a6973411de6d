"""Models on the Hugging Face Hub: in the local cache, or downloaded into it only at the user's
request.

`--model Wan-AI/Wan2.2-I2V-A14B` reads the cache and opens no connection. `--download` prints what
it will fetch and its size, and fetches only what a model needs. An interrupted download can be
resumed.
"""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from minicos.errors import MinicosError

# Repositories of models that their files do not distinguish from another (config.FINETUNES): the id
# identifies them.
KNOWN: Mapping[str, str] = {
    "Video-Reason/VBVR-Wan2.2": "VBVR-Wan2.2",
    "nvidia/ChronoEdit-14B-Diffusers": "ChronoEdit-14B",
    "Wan-AI/Wan2.1-I2V-14B-720P": "Wan2.1-I2V-14B-720P",
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "Wan2.1-I2V-14B-720P",
}
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
WEIGHTS = (".safetensors", ".pth")
SNAPSHOTS = "snapshots"  # in the cache of a repository, with a folder for each revision
FOLDERS = {  # the folders that a model is read from; "" is the repository itself
    "official": ("", "high_noise_model", "low_noise_model", "google/umt5-xxl"),
    "diffusers": (
        "",
        "transformer",
        "transformer_2",
        "vae",
        "text_encoder",
        "image_encoder",
        "tokenizer",
    ),
}
NETWORKS = ("high_noise_model/", "low_noise_model/", "transformer/", "diffusion_pytorch_model")
# Which files are read: by minicos, and by diffusers if it runs the model.
OURS = re.compile(
    r"(.*/)?(model_index\.json|config\.json|tokenizer\.json|.+\.(safetensors(\.index\.json)?|pth))"
)
THEIRS = re.compile(r"model_index\.json|.+/.+\.(safetensors|json|txt|model|jinja)")


def is_id(name: str) -> bool:
    """Whether this is the id of a repository, owner/name. Anything that could leave the cache is
    not an id.
    """
    return (
        ID.fullmatch(name) is not None and ".." not in name and "--" not in name and len(name) <= 96
    )


def cached(repo: str) -> Path:
    """The folder of a repository in the local cache, without a connection. Raises MinicosError with
    the command to fetch it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise MinicosError(
            f"{repo} is neither a file or folder here nor in the Hub's cache: `minicos inspect "
            f"{repo} --download` fetches it."
        ) from error


def fetch(repo: str) -> Path:
    """Fetch what a model needs of a repository into the cache and return its folder there.

    Prints repository, revision, files and bytes to stderr first.

    Raises:
        MinicosError: the repository does not exist, is gated, or is not one complete model; or
            there is no network or not enough disk space.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    from minicos.peers import folder as peers  # which imports this module

    try:
        info = HfApi().model_info(repo, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = needed(repo, sizes, peers.parts(repo, sizes))
        total = sum(wanted.values())
        print(f"fetching {repo}, revision {info.sha}:", file=sys.stderr)
        for name, size in {**wanted, f"bytes in all, to {constants.HF_HUB_CACHE}": total}.items():
            print(f"  {size:>16,}  {name}", file=sys.stderr, flush=True)
        _room(Path(constants.HF_HUB_CACHE), repo, total)
        return Path(
            snapshot_download(
                repo, allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in wanted]
            )
        )
    except MinicosError:
        raise
    except GatedRepoError as error:
        raise MinicosError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo} and log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise MinicosError(
            f"the Hub has no repository {repo}, or it is private: check the id, or log in with `hf "
            "auth login`."
        ) from error
    except OfflineModeIsEnabled as error:
        raise MinicosError(
            f"{repo} cannot be fetched: HF_HUB_OFFLINE is set. Unset it, or leave --download out."
        ) from error
    # any exception of network or disk; the library's HTTP client differs between versions
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MinicosError(
            f"{repo} could not be fetched ({reason}). Check network and disk and run this again: "
            "it continues."
        ) from error


def needed(repo: str, files: Mapping[str, int], parts: Sequence[str] = ()) -> dict[str, int]:
    """The `files` of a repository (name -> bytes) that make up the model, without pictures, copies
    in half precision and the like.

    Args:
        parts: the folders of a model that diffusers runs, which reads more files of each.

    Raises:
        MinicosError: a name leaves the repository, or the repository is not one complete model.
    """
    for name in files:
        if (
            PurePosixPath(name).is_absolute()
            or ".." in PurePosixPath(name).parts
            or "\\" in name
            or "\0" in name
        ):
            raise MinicosError(
                f"{repo} has a file named {name!r}, outside its folder. Do not use this repository."
            )
    folders = parts or FOLDERS["diffusers" if "model_index.json" in files else "official"]
    read = list(filter((THEIRS if parts else OURS).fullmatch, sorted(files)))
    inside = ([name for name in read if name.rpartition("/")[0] == folder] for folder in folders)
    chosen = [name for names in inside for name in _once(names)]
    if not any(name.startswith(NETWORKS) and name.endswith(WEIGHTS) for name in chosen):
        raise MinicosError(
            f"{repo} is not one whole model in the official or the diffusers layout "
            f"({sum(name.endswith(WEIGHTS) for name in files)} files of weights). "
            f"Take the files you want: `hf download {repo} FILE`, then --model FILE and --part "
            "vae=FILE and so on."
        )
    return {name: files[name] for name in chosen}


def _once(names: Sequence[str]) -> list[str]:
    """The files of a folder without duplicates: .pth next to .safetensors, fp16 next to the plain
    ones.
    """
    stems = {name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")}
    kept = [
        name for name in names if not (name.endswith(".pth") and name.removesuffix(".pth") in stems)
    ]
    plain = [
        name for name in kept if not re.search(r"\.(fp16|bf16|fp8\w*)[.-]", name.rpartition("/")[2])
    ]
    return plain if any(name.endswith(WEIGHTS) for name in plain) else kept


def _room(cache: Path, repo: str, total: int) -> None:
    """Raise MinicosError if the disk has no room for the missing bytes."""
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    blobs = cache / f"models--{repo.replace('/', '--')}" / "blobs"
    have = sum(file.stat().st_size for file in blobs.iterdir()) if blobs.is_dir() else 0
    free = shutil.disk_usage(there).free
    if total - have > free:
        raise MinicosError(
            f"{repo} needs {total - have:,} bytes more, and {there} has {free:,} free. Make room, "
            "or set HF_HOME to another disk."
        )
