"""Adapters: distckpt inside other training frameworks, each in a module that imports its framework.

| module | for |
|---|---|
| `distckpt.adapters.lightning` | Lightning, imported as `lightning` |
| `distckpt.adapters.pytorch_lightning` | Lightning, imported as `pytorch_lightning` |
| `distckpt.adapters.transformers` | the `Trainer` of Hugging Face transformers |

Invariant: nothing in distckpt imports one of these modules; whoever does has the framework, or is told how to get it.
"""
