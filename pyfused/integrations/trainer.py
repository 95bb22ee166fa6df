"""transformers' Trainer where peft is not installed: it tells a model with adapters by peft's class alone."""

from __future__ import annotations

from pathlib import Path

import transformers
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME, is_peft_available

from ..model import PeftModel


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` whose checkpoints hold adapters alone, without peft too; with peft it is that class.

    Resuming, ``load_best_model_at_end`` and ``save_model`` read and write what
    :meth:`pyfused.PeftModel.save_pretrained` writes. A model without adapters is treated as ever.
    """

    def _adapters(self) -> PeftModel | None:
        """The model, where it has adapters and transformers does not know."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, PeftModel) and not is_peft_available() else None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self._adapters()
        if model is None:
            return super()._save(output_dir, state_dict)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        # What belongs to a checkpoint besides, and an empty file in the place of the model's weights
        super()._save(str(folder), {})
        if self.args.should_save:
            (folder / SAFE_WEIGHTS_NAME).unlink()
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapters = self._adapters()
        if adapters is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        _load(adapters, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        adapters = self._adapters()
        if adapters is None:
            return super()._load_best_model()
        _load(adapters, Path(self.state.best_model_checkpoint))


def _load(model: PeftModel, folder: Path) -> None:
    """Weights of all adapters; what is active and trainable stays so."""
    for name in list(model.peft_config):
        model.load_adapter(folder if name == "default" else folder / name, name, is_trainable=True)
