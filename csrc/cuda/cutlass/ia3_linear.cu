// The product of ../ia3_linear.cu with an H100's TMA copies and wgmma: CUTLASS's kernel, and an epilogue of its
// visitors that adds the bias, stores base where it is asked for, and multiplies by the factors.
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

#include "../ia3.h"

namespace pyfused {
namespace {

using TileShape = cute::Shape<cute::_128, cute::_256, cute::_64>;
using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
using RowMajor = cutlass::layout::RowMajor;
using Schedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
using Automatic = cutlass::epilogue::collective::EpilogueTileAuto;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
namespace collective = cutlass::epilogue::collective;
namespace fusion = cutlass::epilogue::fusion;

template <class T, class TScale>
struct Product {
  static constexpr int kAlignment = 16 / sizeof(T);
  template <class TVector>
  using Vector = fusion::Sm90RowBroadcast<0, TileShape, TVector, float>;
  using Descriptor = collective::detail::EpilogueDescriptor<TileShape, Automatic, T, T, Schedule>;
  using Aux = collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, T>;
  using Store = fusion::Sm90AuxStore<Aux::Stages, typename Descriptor::EpilogueTile, T, kRound, typename Aux::Stride,
                                     typename Aux::SmemLayoutAtom, typename Aux::CopyOpR2S>;
  // (sums + bias), stored as it passes by, * scale
  using Base = fusion::Sm90EVT<Store, fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, kRound>,
                                                      fusion::Sm90AccFetch, Vector<T>>>;
  using Scaled = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, T, float, kRound>, Base, Vector<TScale>>;
  using Epilogue =
      typename collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape,
                                             ClusterShape, Automatic, float, float, void, RowMajor, kAlignment, T,
                                             RowMajor, kAlignment, Schedule, Scaled>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, RowMajor, kAlignment, T, cutlass::layout::ColumnMajor,
      kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int>, Mainloop, Epilogue>;
  static_assert(Kernel::SharedStorageSize <= 227 * 1024);  // what a block may have on an H100

  template <class Stride>
  static Stride rows(int64_t ld) {
    Stride stride{};
    cute::get<0>(stride) = ld;
    return stride;
  }

  static void launch(const Ia3Linear& call, cudaStream_t stream) {
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {static_cast<int>(call.m), static_cast<int>(call.n), static_cast<int>(call.k)},
                                       {static_cast<const T*>(call.x.data), rows<typename Kernel::StrideA>(call.x.ld),
                                        static_cast<const T*>(call.w.data), rows<typename Kernel::StrideB>(call.w.ld)},
                                       {{{{{}, {static_cast<const T*>(call.bias)}, {}},
                                          {static_cast<T*>(call.base), rows<typename Aux::Stride>(call.n)}},
                                         {static_cast<const TScale*>(call.scale.data)},
                                         {}},
                                        nullptr,
                                        {},
                                        static_cast<T*>(call.out),
                                        rows<typename Kernel::StrideD>(call.n)}};
    arguments.hw_info.sm_count = call.multiprocessors;
    Gemm gemm;
    cutlass::Status status = gemm.can_implement(arguments);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    if (status != cutlass::Status::kSuccess) {
      throw std::runtime_error(std::string("pyfused: launching ia3_linear for sm_90a: ") +
                               cutlass::cutlassGetStatusString(status));
    }
  }
};

template <class T>
void launch(const Ia3Linear& call, cudaStream_t stream) {
  if (call.scale.dtype == Dtype::kFloat32) return Product<T, float>::launch(call, stream);
  Product<T, T>::launch(call, stream);
}

}  // namespace

void launch_ia3_linear_sm90(const Ia3Linear& call, cudaStream_t stream) {
  if (call.dtype == Dtype::kBFloat16) return launch<cutlass::bfloat16_t>(call, stream);
  launch<cutlass::half_t>(call, stream);
}

}  // namespace pyfused
