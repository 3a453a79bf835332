"""`SlimAttention`: multi-head attention that can lose heads."""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparse_callbacks.channels.attention_masks import Mask, added_mask
from sparse_callbacks.core.argument_types import checked


class SlimAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with any number of heads: the same call, the same names of parameters.

    ``nn.MultiheadAttention`` has ``embed_dim / num_heads`` channels in each head, so it cannot lose a head and keep the
    others. Here the size of a head is stated, and the number of heads is what the weights have now. Inputs and outputs
    have ``embed_dim`` channels, and between them lie ``num_heads * head_dim``.

    Differs from ``nn.MultiheadAttention``: torch's fused kernels for whole layers in eval mode are not used, as they read
    the number of heads from ``embed_dim``. They give NaN for queries all of whose keys are masked; here the outputs are
    what torch computes with gradients, of values of 0 (NaN with ``need_weights``). A nested batch of torch's encoders is
    padded. A three-dimensional ``attn_mask`` has one matrix for each head that is left. The output projection is called
    as a layer, with its hooks. ``torch.export`` takes it, ``torch.jit.script`` does not.

    Args:
        embed_dim: channels of queries and outputs.
        num_heads: number of heads.
        dropout: probability of a zero among the attention weights, in train mode.
        bias: whether the projections have biases.
        add_bias_kv: whether a learnt key and value are appended to the sequence.
        add_zero_attn: whether a key and value of zeros are appended.
        kdim: channels of keys; None: those of queries.
        vdim: channels of values; None: those of queries.
        batch_first: whether inputs are [N, L, channels] and not [L, N, channels].
        device: where the parameters lie; None: torch's default device.
        dtype: type of the parameters; None: torch's default type.
        head_dim: channels of each head; ``embed_dim // num_heads`` where it is None.

    Shapes: those of ``nn.MultiheadAttention``.

    Raises:
        ValueError: a size is not positive, ``dropout`` is not between 0 and 1, or torch cannot make the weights.

    Example:
        >>> import torch
        >>> from sparse_callbacks import SlimAttention
        >>> attention = SlimAttention(8, num_heads=3, head_dim=4)
        >>> attention.in_proj_weight.shape, attention.out_proj.weight.shape
        (torch.Size([36, 8]), torch.Size([8, 12]))
        >>> x = torch.zeros(5, 2, 8)
        >>> attention(x, x, x)[0].shape
        torch.Size([5, 2, 8])
    """

    calls_out_proj = True
    """The output projection is called as a layer; ``nn.MultiheadAttention`` reads its weight."""

    @checked
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        head_dim: int | None = None,
    ) -> None:
        size = embed_dim // max(1, num_heads) if head_dim is None else head_dim
        k_size, v_size = (embed_dim if other is None else other for other in (kdim, vdim))
        stated = f"embed_dim={embed_dim}, num_heads={num_heads}, head_dim={size}, kdim={k_size}, vdim={v_size}"
        if min(embed_dim, num_heads, size, k_size, v_size) < 1:
            raise ValueError(f"{stated}: attention has at least one channel in one head. Give positive numbers.")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} is not a probability. Give a number between 0 and 1.")
        # not that of nn.MultiheadAttention, which refuses these sizes
        nn.Module.__init__(self)
        self.head_dim, self.dropout = size, dropout
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        inner, packed = num_heads * size, k_size == v_size == embed_dim
        shapes = {
            "in_proj_weight": (3 * inner, embed_dim) if packed else None,
            "q_proj_weight": None if packed else (inner, embed_dim),
            "k_proj_weight": None if packed else (inner, k_size),
            "v_proj_weight": None if packed else (inner, v_size),
            "in_proj_bias": (3 * inner,) if bias else None,
            "bias_k": (1, 1, inner) if add_bias_kv else None,
            "bias_v": (1, 1, inner) if add_bias_kv else None,
        }
        try:
            for name, shape in shapes.items():
                new = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name, new)
            # the class that nn.MultiheadAttention has there
            self.out_proj = NonDynamicallyQuantizableLinear(inner, embed_dim, bias=bias, device=device, dtype=dtype)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{stated}, device={str(device)!r}, dtype={dtype}: torch cannot make these weights ({error}). Give smaller "
                "sizes, or another device or type."
            ) from error
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name == "in_proj_bias":
                nn.init.zeros_(parameter)
                nn.init.zeros_(self.out_proj.bias)
            elif name in ("bias_k", "bias_v"):
                nn.init.xavier_normal_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)

    @classmethod
    @checked
    def from_attention(cls, attention: nn.MultiheadAttention) -> "SlimAttention":
        """A `SlimAttention` that computes the same as ``attention`` and has the very same Parameters.

        Hooks stay with ``attention``.

        Args:
            attention: the module, of which nothing is changed.

        Raises:
            ValueError: ``attention`` is of a subclass, whose forward may compute something else.
        """
        if type(attention) not in (nn.MultiheadAttention, cls):
            raise ValueError(
                f"attention={type(attention).__name__}(...) is of a subclass of nn.MultiheadAttention, and whether it "
                "computes what that does is not known. Give an nn.MultiheadAttention, or keep the module as it is."
            )
        weight = attention.out_proj.weight
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            attention.out_proj.bias is not None,
            attention.bias_k is not None,
            attention.add_zero_attn,
            attention.kdim,
            attention.vdim,
            attention.batch_first,
            device="meta",
            dtype=weight.dtype,
            head_dim=attention.head_dim,
        )
        for name, parameter in attention.named_parameters(recurse=False):
            new.register_parameter(name, parameter)
        for name, parameter in attention.out_proj.named_parameters():
            new.out_proj.register_parameter(name, parameter)
        return new.train(attention.training)

    # Sizes are read off the weights and never stored, so that a cut needs to change weights alone.

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return int(self.out_proj.weight.shape[1] // self.head_dim)

    @property
    def embed_dim(self) -> int:
        """Channels of the outputs."""
        return int(self.out_proj.weight.shape[0])

    @property
    def kdim(self) -> int:
        """Channels of the keys."""
        return int((self.k_proj_weight if self.in_proj_weight is None else self.in_proj_weight).shape[1])

    @property
    def vdim(self) -> int:
        """Channels of the values."""
        return int((self.v_proj_weight if self.in_proj_weight is None else self.in_proj_weight).shape[1])

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: by this, ``nn.TransformerEncoderLayer`` decides to call its attention and not a fused kernel."""
        return False

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses ``torch.jit.script``, which calls it, with a NotImplementedError."""
        raise NotImplementedError(
            "torch.jit.script does not take a SlimAttention, whose number of heads follows from its weights. Use "
            "torch.export.export, or torch.jit.trace."
        )

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Mask = None,
        need_weights: bool = True,
        attn_mask: Mask = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Mask]:
        """As ``nn.MultiheadAttention.forward``.

        Raises:
            ValueError: shapes or types do not fit each other, ``is_causal`` is given without ``attn_mask``, or nested
                inputs with masks, with ``need_weights`` or for another attention than that of a sequence to itself.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if not (query is key is value) or key_padding_mask is not None or attn_mask is not None or need_weights:
                raise ValueError(
                    "nested inputs are for the attention of one sequence to itself, without masks, with "
                    "need_weights=False. Pad them with to_padded_tensor(0.0), and give key_padding_mask."
                )
            return self._nested(query), None
        inputs = [query, key, value]
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim or key.shape[:-1] != value.shape[:-1]:
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise ValueError(
                f"query, key and value have shapes {shapes}. Give all of them with a batch (3 dimensions) or all without "
                "(2 dimensions), key and value of one length."
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True says that attn_mask is the causal mask, and attn_mask is None. Give it, for example "
                "nn.Transformer.generate_square_subsequent_mask(length)."
            )
        is_batched = query.ndim == 3
        if not is_batched:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if key_padding_mask is not None and not is_batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        out, weights = self._attend(inputs, key_padding_mask, attn_mask, is_causal, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _attend(
        self,
        inputs: Sequence[Tensor],
        padding: Mask,
        mask: Mask,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Mask]:
        """Outputs [N, L, embed_dim], and attention weights [N, heads, L, S] where they are needed.

        Args:
            inputs: query, key and value, [N, L or S, channels].
            padding, mask, is_causal, need_weights: see :meth:`forward`.
        """
        projected, length = self._projected(*inputs), inputs[1].shape[1]
        # [N, heads, length, head_dim]; the number of heads is not stated anywhere, so that it may change
        q, k, v = (torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        if is_causal and padding is None and not need_weights:
            total = None  # the kernel makes the causal mask itself
        else:
            total = added_mask(mask, padding, (q.shape[0], self.num_heads, q.shape[2], length), q.dtype)
            is_causal = False
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        # the appended keys may always be attended to
        if total is not None:
            total = functional.pad(total, (0, k.shape[2] - length))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(2, 3)
            weights = (scores if total is None else scores + total).softmax(-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            heads = weights @ v
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, total, dropout, is_causal)
        # slimming sees by its hooks what arrives there
        return self.out_proj(heads.transpose(1, 2).flatten(2)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, [N, length, inner], the learnt key and value among them."""
        if self.in_proj_weight is not None:
            wq, wk, wv = self.in_proj_weight.chunk(3)
        else:
            wq, wk, wv = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        bq, bk, bv = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = functional.linear(query, wq, bq), functional.linear(key, wk, bk), functional.linear(value, wv, bv)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(x.shape[0], 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        return q, k, v

    def _nested(self, batch: Tensor) -> Tensor:
        """The attention of each sequence in a nested batch to itself, nested."""
        lengths = [len(sequence) for sequence in batch.unbind()]
        padded = batch.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        padding = torch.stack([places >= length for length in lengths])
        out, _ = self._attend([padded] * 3, padding, None, False, False)
        return torch.nested.as_nested_tensor([x[:n] for x, n in zip(out, lengths, strict=True)], layout=batch.layout)
