# SPDX-License-Identifier: Apache-2.0
"""Everything about vLLM: the only room that imports it, knows a private name of it, or names a release.

`support` says which vLLM this is and what it must have, `config` reads a configuration, `layers` the layers of a
running engine, `cache_writer` decides whether our kernel may write a layer's cache, `layer_ops` are the ops in vLLM's
graphs, `report` tells which layers run them, `passes` puts the steps of `fx` where vLLM compiles, `hooks` patches vLLM.

Differences that matter here, with the release that introduced them:

- 0.20: `LayerName` arguments; unused slots are -1 in captured graphs too, which makes capturing the cache write safe.
- 0.22: `fuse_rope_kvcache_cat_mla`, vLLM's own fusion of the same ops, off unless the partition is Inductor's.
- 0.26: sparse implementations inherit the default cache writer; latents may be gathered over a prefill context group.
- 0.28: MLA on the CPU platform, which compiles with plain Inductor and has no pass manager.
- 0.29: DeepSeek-V3.2 and GLM-5 are no longer compiled.
- 0.30: `MLAAttention.update_kv_cache` stands before the writer; HiSparse redirects it.
- 0.31: `concat_and_cache_mla` rounds the scales of fp8_ds_mla up to powers of two.
- 0.32: the passes for sequence parallelism are gone.
- 0.33: Sarvam is compiled, but `use_mla` is False for it.
"""
