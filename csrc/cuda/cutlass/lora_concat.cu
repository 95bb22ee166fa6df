// The product of ../lora_concat.cu with an H100's TMA copies and wgmma, from CUTLASS. Kernel, scheduler and epilogue
// are CUTLASS's; of its main loop the producer is ours: it walks the tiles of (s, c) and then those of (x, w), each
// pair with tensor maps of its own, and the consumers see one longer contraction. With dropout they stop between the
// two for the mask.
//
// Compiled for sm_90a alone, where the build finds CUTLASS's headers (PYFUSED_CUTLASS). Nothing here has run on a GPU.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <stdexcept>
#include <string>

#include "../dropout.cuh"
#include "../lora.h"

namespace pyfused {
namespace {

using TileShape = cute::Shape<cute::_128, cute::_256, cute::_64>;
using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
constexpr int kRows = 128, kColumns = 256, kInner = 64;

int tiles(int64_t contraction) { return static_cast<int>((contraction + kInner - 1) / kInner); }

// A collective main loop of CUTLASS with a second pair of operands before its own. The kernel around it is told of a
// contraction of tiles(r) + tiles(k) whole tiles; what lies beyond r or k the tensor maps fill with zeros.
template <class Base, bool drops>
struct TwoSources : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  struct Arguments {
    typename Base::Arguments rank, base;
    int r, k;
    DropoutSource dropout;
  };
  struct Params : Base::Params {
    typename Base::Params rank;
    int rank_tiles;
    DropoutSource dropout;
  };
  // The consumers are not told which block of out they work on. The producer is ahead of them by less than the blocks
  // that are kept here, since each has at least one tile of either pair.
  static constexpr int kBlocks = Base::DispatchPolicy::Stages + 2;
  struct TensorStorage : Base::TensorStorage {
    int2 blocks[drops ? kBlocks : 1];
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& arguments, void* workspace) {
    const auto of = [&](int contraction, const typename Base::Arguments& operands) {
      const auto [m, n, k, l] = cute::append<4>(shape, 1);
      return Base::to_underlying_arguments(cute::make_shape(m, n, contraction, l), operands, workspace);
    };
    return {of(arguments.k, arguments.base), of(arguments.r, arguments.rank), tiles(arguments.r), arguments.dropout};
  }

  // Base's asks for contractions of whole 16 bytes, as if rows could not be longer; ../lora_concat.cu has asked.
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    Base::prefetch_tma_descriptors(params.rank);
    Base::prefetch_tma_descriptors(params);
  }

  template <class Shape>
  CUTLASS_DEVICE auto load_init(const Shape& shape, const Params& params) const {
    const auto base = Base::load_init(shape, params), rank = Base::load_init(shape, params.rank);
    return cute::make_tuple(cute::get<0>(base), cute::get<1>(base), cute::get<0>(rank), cute::get<1>(rank));
  }

  // The tile scheduler does not split contractions: an iterator is at its first tile.
  template <class Inputs, class Block, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state, const Inputs& inputs,
                           const Block& block, Iterator first_tile, int tile_count, int thread,
                           uint32_t rank_in_cluster, TensorStorage& shared) {
    if constexpr (drops) {  // seen by whoever has waited for the block's first tile
      if (cute::elect_one_sync()) shared.blocks[turn_ % kBlocks] = {cute::get<0>(block), cute::get<1>(block)};
      ++turn_;
    }
    const auto rank = cute::make_tuple(cute::get<2>(inputs), cute::get<3>(inputs));
    Base::load(params.rank, pipeline, state, rank, block, first_tile, params.rank_tiles, thread, rank_in_cluster,
               shared);
    state.advance(params.rank_tiles);
    const auto base = cute::make_tuple(cute::get<0>(inputs), cute::get<1>(inputs));
    Base::load(params, pipeline, state, base, block, first_tile, tile_count - params.rank_tiles, thread,
               rank_in_cluster, shared);
  }

  // As Base's, the last stage included, which mma_tail releases.
  template <class Sums>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState state, Sums& sums, int tile_count, int thread,
                          TensorStorage& shared, const Params& params) {
    if constexpr (!drops) {
      Base::mma(pipeline, state, sums, tile_count, thread, shared, params);
    } else {
      mma_with_mask(pipeline, state, sums, tile_count, thread, shared, params);
    }
  }

 private:
  template <class Sums>
  CUTLASS_DEVICE void mma_with_mask(MainloopPipeline pipeline, PipelineState state, Sums& sums, int tile_count,
                                    int thread, TensorStorage& shared, const Params& params) {
    using namespace cute;
    const auto left = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Base::SmemLayoutA{});
    const auto right = make_tensor(make_smem_ptr(shared.smem_B.data()), typename Base::SmemLayoutB{});
    typename Base::TiledMma tiled;
    const int group = __shfl_sync(0xffffffffu, thread / cutlass::NumThreadsPerWarpGroup, 0);
    const auto slice = tiled.get_slice(group * cutlass::NumThreadsPerWarpGroup);
    const auto a = slice.make_fragment_A(slice.partition_A(left));   // (MMA, MMA_M, MMA_K, stages)
    const auto b = slice.make_fragment_B(slice.partition_B(right));  // (MMA, MMA_N, MMA_K, stages)
    tiled.accumulate_ = GMMA::ScaleOut::Zero;
    PipelineState done = state;
    multiply(pipeline, state, tiled, a, b, sums);
    warpgroup_wait<0>();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = 1; tile < params.rank_tiles; ++tile) {
      multiply(pipeline, state, tiled, a, b, sums);
      warpgroup_wait<0>();
      pipeline.consumer_release(done);
      ++done;
    }
    warpgroup_fence_operand(sums);
    if (params.dropout.threshold != 0) drop_sums(sums, thread, shared.blocks[turn_++ % kBlocks], params.dropout);

    multiply(pipeline, state, tiled, a, b, sums);  // before the loop, or the loop's products would not overlap
    pipeline.consumer_release(done);
    ++done;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = params.rank_tiles + 1; tile < tile_count; ++tile) {
      multiply(pipeline, state, tiled, a, b, sums);
      warpgroup_wait<1>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(done);
      ++done;
    }
    warpgroup_fence_operand(sums);
  }

  // Starts one tile's products. No lambda: wgmma does not go on across a function call.
  template <class A, class B, class Sums>
  CUTLASS_DEVICE static void multiply(MainloopPipeline& pipeline, PipelineState& state, typename Base::TiledMma& tiled,
                                      const A& a, const B& b, Sums& sums) {
    using namespace cute;
    pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < size<2>(a); ++k) {
      cute::gemm(tiled, a(_, _, k, state.index()), b(_, _, k, state.index()), sums);
      tiled.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    ++state;
  }

  // A thread's sums are, as fragments.cuh has them, the pairs at columns 8 j + 2 t of rows g and g + 8, j after j.
  template <class Sums>
  CUTLASS_DEVICE static void drop_sums(Sums& sums, int thread, int2 block, const DropoutSource& dropout) {
    static_assert(cute::is_same_v<typename Base::TiledMma::AtomLayoutC_TV, cute::GMMA::CLayout_64xN<kColumns>>);
    static_assert(decltype(cute::size(sums))::value == kColumns / 2 && kColumns % philox::kBlockColumns == 0);
    constexpr int kParts = kColumns / philox::kBlockColumns;
    const int lane = thread % 32;
    const int64_t row = static_cast<int64_t>(block.x) * kRows + thread / 32 * 16 + lane / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2 * kParts; ++half) {
      uint32_t keep[4][4];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        keep_masks(keep[i], static_cast<uint64_t>(__ldg(dropout.seed)), dropout.threshold, row + half % 2 * 8,
                   static_cast<int64_t>(block.y) * kParts + half / 2, 4 * i + lane % 4);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < philox::kBlockColumns / 8; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (!(keep[j % 4][j / 4] >> (16 * i) & 1u)) sums(half / 2 * 64 + 4 * j + half % 2 * 2 + i) = 0.0f;
        }
      }
    }
  }

  int turn_ = 0;  // blocks of out so far
};

template <class T, bool kTransposed>
struct Product {
  using LayoutB = std::conditional_t<kTransposed, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  static constexpr int kAlignment = 16 / sizeof(T);
  using Bias = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, T, float, cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch, cutlass::epilogue::fusion::Sm90RowBroadcast<0, TileShape, T, float>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor, kAlignment, T,
      cutlass::layout::RowMajor, kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative, Bias>::CollectiveOp;
  using Mainloop = TwoSources<
      typename cutlass::gemm::collective::CollectiveBuilder<
          cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, cutlass::layout::RowMajor, kAlignment, T, LayoutB,
          kAlignment, float, TileShape, ClusterShape,
          cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
          cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp,
      kTransposed>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int>, Mainloop, Epilogue>;
  static_assert(Kernel::SharedStorageSize <= 227 * 1024);  // what a block may have on an H100

  // [rows, contraction] in memory as rows, or as columns where the strides say so
  template <class Stride>
  static Stride stride(int64_t ld) {
    Stride stride{};
    if constexpr (cute::is_static<cute::tuple_element_t<0, Stride>>::value) {
      cute::get<1>(stride) = ld;
    } else {
      cute::get<0>(stride) = ld;
    }
    return stride;
  }

  static void launch(const LoraConcat& call, cudaStream_t stream) {
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    using StrideA = typename Kernel::StrideA;
    using StrideB = typename Kernel::StrideB;
    const auto pair = [](const ConstRows& left, const ConstRows& right) -> decltype(Mainloop::Arguments::rank) {
      return {static_cast<const T*>(left.data), stride<StrideA>(left.ld), static_cast<const T*>(right.data),
              stride<StrideB>(right.ld)};
    };
    const int contraction = (tiles(call.r) + tiles(call.k)) * kInner;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(call.m), static_cast<int>(call.n), contraction},
        {pair(call.s, call.c), pair(call.x, call.w), call.r, static_cast<int>(call.k), call.dropout},
        {{{}, {static_cast<const T*>(call.bias)}, {}},
         nullptr,
         {},
         static_cast<T*>(call.out),
         stride<typename Kernel::StrideD>(call.ld_out)}};
    arguments.hw_info.sm_count = call.multiprocessors;
    Gemm gemm;
    cutlass::Status status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    if (status != cutlass::Status::kSuccess) {
      throw std::runtime_error(std::string("pyfused: launching lora_concat for sm_90a: ") +
                               cutlass::cutlassGetStatusString(status));
    }
  }
};

template <class T>
void launch(const LoraConcat& call, cudaStream_t stream) {
  if (call.transposed) return Product<T, true>::launch(call, stream);
  Product<T, false>::launch(call, stream);
}

}  // namespace

void launch_lora_concat_sm90(const LoraConcat& call, cudaStream_t stream) {
  if (call.type == Dtype::kBFloat16) return launch<cutlass::bfloat16_t>(call, stream);
  launch<cutlass::half_t>(call, stream);
}

}  // namespace pyfused
