# SPDX-License-Identifier: Apache-2.0
"""Recordings of decode steps as the profiler gives them, made up with known contents, for the tests of the examples."""

from __future__ import annotations

ATTENTION = (
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90"
    "<2, cute::tuple<cute::C<1>, cute::C<1>, cute::C<1>>, 512, cutlass::bfloat16_t, cutlass::gemm::Dummy> > >(Params)"
)
COMBINE = "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<8>>, 5, 256> >(Params)"
GEMM = "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"
SPLIT_K = "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, float>(cublasSplitKParams)"
UK_BMM = "void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128, 16, 4, 4, false>(cublasGemvParamsEx)"
NORM = "triton_red_fused_add_mean_mul_pow_rsqrt_split_1"
K_ROPE = "triton_poi_fused_cat_index_select_mul_sub_unsqueeze_2"
Q_ROPE = "triton_poi_fused_cat_index_select_mul_sub_view_3"
STOCK_WRITER = "void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::Fp8KVCacheDataType)0>(...)"
FUSED = "void (anonymous namespace)::mla_rope_cache_vector<__nv_bfloat16, 64, false>(Params)"
ACTIVATION = "void vllm::act_and_mul_kernel<__nv_bfloat16>(...)"
EMBEDDING = "void at::native::vectorized_gather_kernel<16>(...)"
SCHEDULE = "flash::prepare_varlen_num_blocks_kernel(...)"
MOE = "fused_moe_kernel"
SAMPLER = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float> > >(...)"

BEFORE_ATTENTION = {"off": [K_ROPE, Q_ROPE, STOCK_WRITER], "on": [FUSED]}
DURATIONS = {K_ROPE: 1.5, Q_ROPE: 2.5, STOCK_WRITER: 2.0, FUSED: 2.25, NORM: 1.75, ATTENTION: 9.0}

Event = tuple[float, float, str]


def layer(mode: str, is_first: bool) -> list[str]:
    """Kernels of one layer: MLA as DeepSeek-V3's, then a dense MLP in the first layer and experts in the others."""
    before = [NORM, GEMM, SPLIT_K, NORM, GEMM, *BEFORE_ATTENTION[mode], UK_BMM]
    dense, experts = [GEMM, ACTIVATION, GEMM], [GEMM, "moe_align_block_size_kernel", MOE, ACTIVATION, MOE]
    return [*before, ATTENTION, COMBINE, UK_BMM, GEMM, NORM, *(dense if is_first else experts)]


def step(mode: str, layers: int) -> list[str]:
    """Kernels of one decode step."""
    body = [kernel for i in range(layers) for kernel in layer(mode, i == 0)]
    return [EMBEDDING, SCHEDULE, *body, NORM, GEMM, SAMPLER]


def recording(mode: str, layers: int = 4, steps: int = 3, cut: int = 0, gap: float = 0.5) -> list[Event]:
    """`steps` steps of [start_us, duration_us, kernel]; the first and the last `cut` kernels are missing."""
    time, events = 1000.0, []
    for name in step(mode, layers) * steps:
        duration = DURATIONS.get(name, 4.0)
        events.append((time, duration, name))
        time += duration + gap
    return events[cut : len(events) - cut]
