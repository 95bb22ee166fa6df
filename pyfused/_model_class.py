"""The class of a :class:`pyfused.PeftModel`, made at run time for the class of the model that is in it."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from torch import nn


@functools.cache
def class_for(cls: type[nn.Module], model_class: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with a ``forward`` that says what ``model_class.forward`` takes, known to ``isinstance`` as HF PEFT's.

    transformers' Trainer, TRL and accelerate save, resume and unwrap adapters where ``isinstance(model,
    peft.PeftModel)``. That looks at ``__class__`` where the type does not tell, so ``__class__`` is a property: once
    peft is imported, by whomever, it is a class that derives from both. The object's own type inherits nothing of
    peft, so a method that pyfused does not have is missing and not HF PEFT's.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(model_class.forward)
    forward.__doc__ = cls.forward.__doc__
    members = {
        "forward": forward,
        "_signature_of": model_class,
        "__class__": property(_shown_class, object.__dict__["__class__"].__set__),
    }
    return _subclass(cls, (), members)


def made_from(kind: type[nn.Module]) -> type[nn.Module]:
    """The ``cls`` that ``kind`` was made of by :func:`class_for`."""
    return next(cls for cls in kind.__mro__ if "_signature_of" not in vars(cls))


def _shown_class(self: nn.Module) -> type[nn.Module]:
    kind = type(self)
    theirs = getattr(sys.modules.get("peft"), "PeftModel", None)  # not there while peft is being imported
    return kind if theirs is None or issubclass(kind, theirs) else _shown_as(kind, theirs)


@functools.cache
def _shown_as(kind: type[nn.Module], theirs: type[nn.Module]) -> type[nn.Module]:
    # FSDP2 derives the type that it gives a module from __class__; what only HF PEFT has must stay missing there too.
    return _subclass(kind, (theirs,), {name: _Missing(name) for name in set(dir(theirs)) - set(dir(kind))})


class _Missing:
    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__!r} has no attribute {self.name!r}")


def _subclass(kind: type[nn.Module], others: tuple[type, ...], members: dict[str, Any]) -> type[nn.Module]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, *others), members | names)
