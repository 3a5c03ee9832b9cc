"""Where checkpoints lie: local files, and object stores through fsspec."""

from distckpt.storage.contract import Buffer, Capabilities, FileInfo, Storage

__all__ = ["Buffer", "Capabilities", "FileInfo", "Storage"]
