"""The choice of the next tokens in two or three kernels, and one for random numbers."""
# Kernels annotate plain values as constexpr.
# pyright: reportArgumentType=false

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from ssm_hf.generation.kernels import cut_kernel, note_kernel, scores_kernel
from ssm_hf.generation.select import Recipe, Request, Selection
from ssm_hf.ops.launch import on_device, overlapping, power_of_two, tuned


class FusedSelection(Selection):
    """A `Selection` whose numbers lie on the device: recipes of one kind share a captured step.

    The noise is `torch.empty.exponential_()`, the numbers that `torch.multinomial` draws with.
    """

    def __init__(self, recipe: Recipe, batch: int, vocabulary: int, device: torch.device) -> None:
        super().__init__(recipe, batch, vocabulary, device)
        self.cuts = bool(recipe.top_k) or recipe.top_p < 1 or recipe.min_p > 0
        # A cut wants the best scores of many small parts.
        self._options = tuned("next_token_scores", "cut" if self.cuts else "default", device)
        self.blocks = -(-vocabulary // self._options["BLOCK"])
        self.best = torch.empty(batch, self.blocks, device=device)
        self.at = torch.empty(batch, self.blocks, dtype=torch.int32, device=device)
        self.reals = torch.ones(5, device=device)
        self.top_k = torch.zeros((), dtype=torch.int32, device=device)
        self._values: list[np.float32] = []
        self.noise = torch.ones(batch, vocabulary, device=device) if recipe.sample else None
        self.scores = torch.empty(batch, vocabulary, device=device) if self.cuts else None
        self.kept = self.index = None
        if recipe.top_k:
            self.kept = torch.empty(batch, vocabulary, device=device)
            self.index = torch.empty(batch, vocabulary, dtype=torch.int32, device=device)

    @staticmethod
    def key(recipe: Recipe) -> Hashable:
        """What the kernels are compiled for; all other numbers are read from the device."""
        return recipe._replace(
            penalty=float(recipe.penalty != 1),
            temperature=float(recipe.temperature != 1),
            top_k=int(recipe.top_k > 0),
            top_p=float(recipe.top_p < 1),
            min_p=float(recipe.min_p > 0),
        )

    def start(self, request: Request, input_ids: Tensor) -> None:
        """Begin a call with the prompt input_ids (B, T)."""
        super().start(request, input_ids)
        recipe, one = request.recipe, np.float32(1)
        # As torch divides by a number on a GPU: by multiplying with its fp32 inverse.
        values = [
            np.float32(recipe.penalty),
            one / np.float32(recipe.penalty),
            one / np.float32(recipe.temperature),
            np.float32(recipe.top_p),
            np.float32(recipe.min_p),
        ]
        # Numbers of the host that are copied to the device make the host wait for the prompt.
        if values != self._values:
            self._values = values
            self.reals.copy_(torch.tensor(np.array(values)))
        self.top_k.fill_(recipe.top_k)

    def choose(self, logits: Tensor) -> None:
        """Take the next tokens by logits (B, V) of any float dtype and note them everywhere."""
        recipe = self.recipe
        batch, vocabulary = logits.shape
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        device = logits.device
        if self.noise is not None:
            self.noise.exponential_()
        with on_device(logits):
            scores_kernel[(batch, self.blocks)](
                logits,
                self.noise,
                self.seen,
                self.suppressed,
                self.count,
                self.min_new_tokens,
                self.reals,
                self.scores,
                self.best,
                self.at,
                logits.stride(0),
                vocabulary,
                self.blocks,
                PENALTY=self.seen is not None,
                SUPPRESS=self.suppressed is not None,
                TEMPERATURE=recipe.temperature != 1,
                DRAW=recipe.sample and not self.cuts,
                KEEP=self.cuts,
                **self._options,
                **overlapping(True, device),
            )
            if self.cuts:
                cut_kernel[(batch,)](
                    self.scores,
                    self.noise,
                    self.best,
                    self.at,
                    self.reals,
                    self.top_k,
                    self.kept,
                    self.index,
                    vocabulary,
                    self.blocks,
                    TOP_K=recipe.top_k > 0,
                    TOP_P=recipe.top_p < 1,
                    MIN_P=recipe.min_p > 0,
                    BLOCK_PARTS=power_of_two(self.blocks),
                    **tuned("next_token_cut", "top_k" if recipe.top_k else "all", device),
                    **overlapping(True, device),
                )
            parts = 1 if self.cuts else self.blocks
            note_kernel[(1,)](
                self.best,
                self.at,
                self.eos,
                self.unfinished,
                self.alive,
                self.count,
                self.broken,
                self.seen,
                self.tokens,
                self.chosen,
                batch,
                vocabulary,
                self.blocks,
                parts,
                recipe.pad,
                self.capacity,
                len(recipe.eos),
                SAMPLE=recipe.sample,
                EOS=bool(recipe.eos),
                PENALTY=self.seen is not None,
                BLOCK_B=min(power_of_two(batch), 64),
                BLOCK_PARTS=power_of_two(parts),
                BLOCK_EOS=power_of_two(len(recipe.eos)),
                **tuned("next_token_note", "many" if batch > 16 else "default", device),
                **overlapping(True, device),
            )
