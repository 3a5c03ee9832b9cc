"""What is saved: the states of real trainings, each with a real step of training.

Values and shapes are those of the models; only the training data are random, since no benchmark looks at a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xxhash
from torch import nn

Size = Literal["tiny", "moderate", "full"]
Device = Literal["cpu", "cuda"]

MODERATE = ("resnet50", "small")
FULL = ("resnet50", "small", "vgg16", "gpt2-medium")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A training's state.

    Attributes:
        name: Its name.
        objects: What a user would name: modules, optimizers, tensors.
        train: One step of training; on a GPU it ends when the device is done, as in a loop that looks at its loss.
        device: Where its tensors lie.
    """

    name: str
    objects: dict[str, Any]
    train: Callable[[], None]
    device: Device = "cpu"

    def tree(self) -> dict[str, Any]:
        """Return the state as `state_dict()` gives it: nested, sharing its memory."""
        return {key: each.state_dict() if hasattr(each, "state_dict") else each for key, each in self.objects.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor by its path, sharing its memory."""
        return named_tensors(self.tree())

    @property
    def num_bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @torch.no_grad()
    def scramble(self) -> None:
        """Overwrite every value, so that a load that loads nothing is found out."""
        for tensor in self.tensors().values():
            tensor.fill_(1)

    def digest(self) -> str:
        """Return a digest of every value."""
        hasher = xxhash.xxh3_128()
        for name, tensor in sorted(self.tensors().items()):
            hasher.update(name.encode())
            hasher.update(view(tensor.cpu()))
        return str(hasher.hexdigest())


def view(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def named_tensors(tree: Any) -> dict[str, torch.Tensor]:
    """Return every tensor of a tree by its path, sharing its memory."""
    return dict(_walk(tree, ""))


def _walk(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
        return
    children: Sequence[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        children = list(tree.items())
    elif isinstance(tree, list | tuple):
        children = list(enumerate(tree))
    for key, child in children:
        yield from _walk(child, f"{path}.{key}" if path else str(key))


def make(name: str, size: Size, *, device: Device = "cpu", parallel: bool = False) -> State:
    """Return a state, after one step of training so that the optimizer has its tensors; the same on every rank.

    With `parallel` its model stands in DistributedDataParallel, on the default process group.

    Raises:
        ValueError: There is no such state.
    """
    tiny = size == "tiny"
    match name:
        case "resnet50":
            state = _classifier(name, "shufflenet_v2_x0_5" if tiny else "resnet50", _adamw, device, parallel)
        case "vgg16":
            state = _classifier(name, "squeezenet1_1" if tiny else "vgg16", _momentum, device, parallel)
        case "gpt2-medium":
            state = _language_model(name, tiny=tiny, device=device, parallel=parallel)
        case "small":
            state = small_tensors(200 if tiny else 20_000, device=device)
        case _:
            raise ValueError(f"no state {name!r}; there are {', '.join(FULL)}")
    state.train()
    return state


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def _momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _classifier(
    name: str, architecture: str, optimize: Callable[[nn.Module], torch.optim.Optimizer], device: Device, parallel: bool
) -> State:
    """Return a torchvision model; on a CPU it sees small images, so that a step is shorter than a save."""
    import torchvision

    torch.manual_seed(0)
    options = {"init_weights": False} if architecture.startswith("vgg") else {}
    model = _placed(torchvision.models.get_model(architecture, **options), device, parallel)
    optimizer = optimize(model)
    num_images, edge = (64, 224) if device == "cuda" else (4, 32)
    images = torch.randn(num_images, 3, edge, edge, device=device)
    labels = torch.randint(0, 1000, (num_images,), device=device)

    def train() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
        _end_step(device)

    return State(name=name, objects={"model": model, "optimizer": optimizer}, train=train, device=device)


def _placed(model: nn.Module, device: Device, parallel: bool) -> nn.Module:
    model = model.to(device)
    return nn.parallel.DistributedDataParallel(model) if parallel else model


def _end_step(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class _LanguageModel(nn.Module):
    """A decoder as GPT-2 has it: 24 layers of 1024 for the medium one, with input and output embedding tied."""

    def __init__(self, *, width: int, num_layers: int, num_heads: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return a score for each next token."""
        length = tokens.shape[1]  # tokens: [batch, length] int64
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.tokens(tokens) + self.places(torch.arange(length, device=tokens.device))
        return nn.functional.linear(self.layers(hidden, mask=mask, is_causal=True), self.tokens.weight)


def _language_model(name: str, *, tiny: bool, device: Device, parallel: bool) -> State:
    torch.manual_seed(0)
    medium = {"width": 1024, "num_layers": 24, "num_heads": 16, "vocabulary": 50_257, "context": 1024}
    small = {"width": 64, "num_layers": 2, "num_heads": 2, "vocabulary": 500, "context": 64}
    model = _placed(_LanguageModel(**(small if tiny else medium)), device, parallel)
    optimizer = _adamw(model)
    num_texts, length = (8, 512) if device == "cuda" and not tiny else (1, 16)
    tokens = torch.randint(0, 500, (num_texts, length + 1), device=device)

    def train() -> None:
        optimizer.zero_grad()
        scores = model(tokens[:, :-1])
        torch.autograd.backward(nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.step()
        _end_step(device)

    return State(name=name, objects={"model": model, "optimizer": optimizer}, train=train, device=device)


def small_tensors(num_tensors: int, *, device: Device = "cpu") -> State:
    """Return a state of so many tensors of 256 bytes, whose training changes none of them."""
    torch.manual_seed(0)
    tensors = {f"group{i // 100}.tensor{i}": torch.randn(64, device=device) for i in range(num_tensors)}
    matrix = torch.randn(256, 256, device=device)

    def train() -> None:
        matrix.matmul(matrix)
        _end_step(device)

    return State(name="small", objects={"tensors": tensors}, train=train, device=device)
