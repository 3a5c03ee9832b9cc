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

MODERATE = ("resnet50", "small")
FULL = ("resnet50", "small", "vgg16", "gpt2-medium")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A training's state.

    Attributes:
        name: Its name.
        objects: What a user would name: modules, optimizers, tensors.
        train: One step of training.
    """

    name: str
    objects: dict[str, Any]
    train: Callable[[], None]

    def tree(self) -> dict[str, Any]:
        """Return the state as `state_dict()` gives it: nested, sharing its memory."""
        return {key: each.state_dict() if hasattr(each, "state_dict") else each for key, each in self.objects.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor by its path, sharing its memory."""
        return dict(_walk(self.tree(), ""))

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
            hasher.update(view(tensor))
        return str(hasher.hexdigest())


def view(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


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


def names(size: Size) -> tuple[str, ...]:
    """Return the states that belong to a size."""
    return FULL if size == "full" else MODERATE


def make(name: str, size: Size) -> State:
    """Return a state, after one step of training so that the optimizer has its tensors; the same on every rank.

    Raises:
        ValueError: There is no such state.
    """
    torch.manual_seed(0)
    tiny = size == "tiny"
    match name:
        case "resnet50":
            state = _classifier(name, "shufflenet_v2_x0_5" if tiny else "resnet50", _adamw)
        case "vgg16":
            state = _classifier(name, "squeezenet1_1" if tiny else "vgg16", _momentum)
        case "gpt2-medium":
            state = _language_model(name, tiny=tiny)
        case "small":
            state = _small(name, num_tensors=200 if tiny else 20_000)
        case _:
            raise ValueError(f"no state {name!r}; there are {', '.join(FULL)}")
    state.train()
    return state


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def _momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _classifier(name: str, architecture: str, optimize: Callable[[nn.Module], torch.optim.Optimizer]) -> State:
    """Return a torchvision model that is trained on small images, so that a step is shorter than a save."""
    import torchvision

    options = {"init_weights": False} if architecture.startswith("vgg") else {}
    model = torchvision.models.get_model(architecture, **options)
    optimizer = optimize(model)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 1000, (4,))

    def train() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()

    return State(name=name, objects={"model": model, "optimizer": optimizer}, train=train)


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
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.tokens(tokens) + self.places(torch.arange(length))
        return nn.functional.linear(self.layers(hidden, mask=mask, is_causal=True), self.tokens.weight)


def _language_model(name: str, *, tiny: bool) -> State:
    medium = {"width": 1024, "num_layers": 24, "num_heads": 16, "vocabulary": 50_257, "context": 1024}
    small = {"width": 64, "num_layers": 2, "num_heads": 2, "vocabulary": 500, "context": 64}
    model = _LanguageModel(**(small if tiny else medium))
    optimizer = _adamw(model)
    tokens = torch.randint(0, 500, (1, 17))

    def train() -> None:
        optimizer.zero_grad()
        scores = model(tokens[:, :-1])
        torch.autograd.backward(nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.step()

    return State(name=name, objects={"model": model, "optimizer": optimizer}, train=train)


def _small(name: str, *, num_tensors: int) -> State:
    tensors = {f"group{i // 100}.tensor{i}": torch.randn(64) for i in range(num_tensors)}
    matrix = torch.randn(256, 256)

    def train() -> None:
        matrix.matmul(matrix)

    return State(name=name, objects={"tensors": tensors}, train=train)
