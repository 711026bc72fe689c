"""CAUSE with a transformer (CAUSE-TR): the codes of CAUSE, of embeddings that concepts asked.

Kim et al., *Causal unsupervised semantic segmentation*, 2023. The three stages are `cause`'s. The
head first decodes the embeddings u of an image by its codebook: with q_i the concept nearest to
u_i, and a learned position p_i,

    q <- norm(q + attention(q + p, q + p, q))        among the queries
    q <- norm(q + attention(q + p, u, u))            to the embeddings
    q <- norm(q + layers(q)),    u <- u + norm(q)

and codes are those of the decoded u (`decoders.CodebookDecoder`). So they depend on the whole
image, and patches are drawn after the head. Left out: what `cause` leaves out. There positions
belong to one size of image; here they are interpolated.
"""

from __future__ import annotations

from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from iddc.config import Experiment, Frozen
from iddc.methods.cause import Cause, CauseConfig
from iddc.methods.method import Collection
from iddc.network import CodebookCodes, Codes


class CauseTrConfig(CauseConfig):
    """The numbers of CAUSE-TR. Defaults: the authors' for COCO-Stuff-27."""

    grid: int = Field(28, ge=2)
    """The rows and columns of the learned positions."""
    hidden: int = Field(2048, ge=2)
    """The width of the decoder's inner layer."""
    clip: float = Field(2.0, gt=0)
    """The largest norm of the gradients in the second and third stage."""


class CauseTr(Cause):
    """The head's decoder and codes are the teacher's; its centroids are of the third stage."""

    name = "cause-tr"
    about = "CAUSE-TR (Kim et al., 2023): CAUSE with a decoder that asks by concepts."
    Config = CauseTrConfig
    heads = ("codebook-codes",)
    head: CodebookCodes
    student: CodebookCodes
    options: CauseTrConfig

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self._share_codebook()

    @classmethod
    def head_options(cls, options: Frozen) -> dict[str, int]:
        """The length of a code, and the sizes of the decoder."""
        return options.model_dump(include={"dim", "concepts", "grid", "hidden"})

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """The first stage before the steps, whose codebook asks, and the third after them."""
        found = super().refit(collection, epoch, epochs)
        self._share_codebook()
        return found

    def _share_codebook(self) -> None:
        """Give both heads the concepts."""
        for head in (self.head, self.student):
            head.decoder.codebook.copy_(self.codebook)

    @staticmethod
    def codes_at(
        head: Codes, maps: Float[Tensor, "b d h w"], here: Int64[Tensor, " m"]
    ) -> Float[Tensor, "b c m 1"]:
        """The codes of some patches, which depend on all of them."""
        return head.codes(maps).flatten(2)[:, :, here, None]
