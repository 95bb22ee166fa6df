// The launchers of csrc/cuda/multi_lora.h against naive loops, see lora_test.cu.
#include <algorithm>
#include <string>
#include <vector>

#include "launcher_test.h"
#include "multi_lora.h"

namespace pyfused {
namespace {

struct Shape {
  int64_t m, k, n;
};

constexpr uint64_t kSeed = 12345678901ull;
constexpr int kAdapters = 4;
constexpr int kRowsOfParts = 64;  // the fewest: some adapters have more

// The launched sort of a batch's rows by adapter, with as many adapters as there are groups.
MultiLoraGroups sorted(DeviceArray<int>& index, DeviceArray<int>& rows, DeviceArray<RowGroup>& groups,
                       DeviceArray<RowTile>& tiles, DeviceArray<RowTile>& parts) {
  MultiLoraGroups sort{};
  sort.index = index.to_device();
  sort.entries = sort.m = static_cast<int64_t>(index.host.size());
  sort.adapters = static_cast<int64_t>(groups.host.size());
  sort.rows = rows.to_device();
  sort.groups = groups.to_device();
  sort.tiles = tiles.to_device();
  sort.parts = parts.to_device();
  sort.part_rows = kRowsOfParts;
  launch_multi_lora_groups(sort, nullptr);
  return sort;
}

// Several adapters of 20 ranks or less, one of them none, one without rows; every fourth row is of nobody.
template <class TX, class TC>
struct MultiLoraTest {
  using S = Sum<Compute<TX, TC>>;
  static constexpr int kRank = 20;
  const std::string name;
  const KernelTypes types;
  const int64_t M, K, N;
  TestMatrix<TX> x, dy, y, dx;
  TestMatrix<TC> a, b, grad_a, grad_b;  // the adapters' below each other, each with kRank rows or N
  TestMatrix<S> s, ds;
  DeviceArray<int> index, rows;
  DeviceArray<int64_t> seed{1};
  DeviceArray<RowGroup> groups{kAdapters};
  DeviceArray<RowTile> tiles, parts;
  DeviceArray<MultiAdapter> table{kAdapters};
  std::vector<MultiAdapter> host_table;
  std::vector<std::vector<int>> rows_of{kAdapters};

  MultiLoraTest(const char* name, KernelTypes types, const Shape& shape)
      : name(std::string("multi_lora ") + name + " M=" + std::to_string(shape.m) + " K=" + std::to_string(shape.k)),
        types(types),
        M(shape.m),
        K(shape.k),
        N(shape.n),
        x(M, K, K + 3, 1),
        dy(M, N, N, 2),
        y(M, N, N + 5, 3),
        dx(M, K, K, 0),
        a(kAdapters * kRank, K, K, 4),
        b(kAdapters * N, kRank, kRank, 5),
        grad_a(kAdapters * kRank, K, K, 0),
        grad_b(kAdapters * N, kRank, kRank, 0),
        s(M, kRank, kRank, 0),
        ds(M, kRank, kRank, 0),
        index(static_cast<size_t>(M)),
        rows(static_cast<size_t>(M)),
        tiles(static_cast<size_t>(row_tiles(M, kAdapters))),
        parts(static_cast<size_t>(row_parts(M, kAdapters, kRowsOfParts))) {
    for (int64_t i = 0; i < M; ++i) {
      index.host[i] = i % 4 == 3 ? -1 : i % 3 == 0 ? 2 : static_cast<int>(i % 2);
      if (index.host[i] >= 0) rows_of[index.host[i]].push_back(static_cast<int>(i));
    }
    seed.host[0] = kSeed;
  }

  int rank(int adapter) const { return adapter == 1 ? 0 : adapter == 0 ? 3 : kRank; }
  double scale(int adapter) const { return 0.5 + adapter; }
  static constexpr uint32_t threshold() { return 20000; }
  double dropout_scale() const { return 65536.0 / (65536 - threshold()); }
  double dropped(int adapter, int64_t place, int64_t column) const {
    return keeps(kSeed, threshold(), place, column) ? x.at(rows_of[adapter][place], column) : 0.0;
  }
  double a_of(int adapter, int r, int64_t k) const { return a.at(adapter * kRank + r, k); }
  double b_of(int adapter, int64_t n, int r) const { return b.at(adapter * N + n, r); }

  void run() {
    const MultiLoraGroups sort = sorted(index, rows, groups, tiles, parts);
    rows.to_host(), groups.to_host(), tiles.to_host(), parts.to_host();
    check_groups();

    const TC *of_a = a.to_device(), *of_b = b.to_device();
    TC *to_a = grad_a.to_device(), *to_b = grad_b.to_device();
    for (int i = 0; i < kAdapters; ++i) {
      MultiAdapter& adapter = host_table.emplace_back();
      adapter = {};
      adapter.a = of_a + i * kRank * K;
      adapter.b = of_b + i * N * kRank;
      adapter.ld_a = K;
      adapter.ld_b = kRank;
      adapter.scale = scale(i);
      adapter.dropout_scale = dropout_scale();
      adapter.dropout = {seed.to_device(), threshold()};
      adapter.type_a = adapter.type_b = adapter.products = adapter.products_x = types.adapter;
      adapter.r = rank(i);
      adapter.grad_a = to_a + i * kRank * K;
      adapter.grad_b = to_b + i * N * kRank;
    }
    launch_multi_lora_table(host_table.data(), kAdapters, table.to_device(), nullptr);
    table.to_host();
    MultiLoraPass pass{};
    pass.types = types;
    pass.m = M;
    pass.rows = sort.rows;
    pass.groups = sort.groups;
    pass.tiles = sort.tiles;
    pass.tile_count = row_tiles(M, kAdapters);
    pass.table = table.to_device();
    pass.adapters = kAdapters;
    pass.max_rank = kRank;
    pass.parts = sort.parts;
    pass.part_rows = sort.part_rows;
    if (M <= kMaxDecodeRows) check_decode(pass, sort);
    check_forward(pass);
    check_backward(pass);
  }

  // One launch in place of shrink and expand: no dropout, and the same bits, also of what an infinity in x makes.
  void check_decode(MultiLoraPass pass, const MultiLoraIndex& batch) {
    const std::vector<TX> before = y.host, finite_x = x.host;
    const int row = rows_of[0][0];  // of an adapter whose ranks do not fill a tile
    x.host[row * x.ld + 1] = from_double<TX>(std::numeric_limits<double>::infinity());
    const int max_rank = sizeof(TX) == 8 ? 16 : kRank;  // what there is room for
    DeviceArray<MultiAdapter> plain{kAdapters};
    MultiLoraDecode decode{};
    for (int i = 0; i < kAdapters; ++i) {
      MultiAdapter adapter = host_table[i];
      adapter.dropout = {};
      adapter.dropout_scale = 1.0;
      adapter.r = std::min(adapter.r, max_rank);
      plain.host[i] = adapter;
      decode.adapters[i] = {adapter.a, adapter.b, static_cast<int>(K), kRank, adapter.r, adapter.scale};
    }
    pass.table = plain.to_device();
    const MultiLoraShrink shrink{pass, false, 0, 1, K, x.as_rows(), 1, s.to_device()};
    launch_multi_lora_shrink(shrink, nullptr);
    MultiLoraExpand expand{};
    expand.pass = pass;
    expand.slices = expand.splits = 1;
    expand.parts = shrink.parts;
    expand.n[0] = N;
    expand.out[0] = y.to_device();
    expand.ld_out[0] = y.ld;
    launch_multi_lora_expand(expand, nullptr);
    y.to_host();
    const std::vector<TX> in_passes = y.host;
    bool has_infinity = false;
    for (int64_t n = 0; n < N; ++n) has_infinity = has_infinity || std::isinf(y.at(row, n));
    check(has_infinity, name + ": an infinity");

    y.host = before;
    decode.types = types;
    decode.batch = batch;
    decode.k = K;
    decode.x = x.as_rows();
    decode.slices = 1;
    decode.n[0] = N;
    decode.out[0] = y.to_device();
    decode.ld_out[0] = y.ld;
    check(multi_lora_decode_fits(types, M, K, M, kAdapters, 1, max_rank), name + ": decode fits");
    launch_multi_lora_decode(decode, nullptr);
    y.to_host();
    bool same = true;
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t n = 0; n < N; ++n) {
        const TX one = y.host[i * y.ld + n], other = in_passes[i * y.ld + n];
        same = same && (std::memcmp(&one, &other, sizeof one) == 0 ||
                        (std::isnan(to_float(one)) && std::isnan(to_float(other))));
      }
    }
    check(same, name + ": decode's bits");
    y.host = before;
    x.host = finite_x;
  }

  void check_groups() {
    bool good = true;
    int begin = 0;
    for (int i = 0; i < kAdapters; ++i) {
      const RowGroup group = groups.host[i];
      good = good && group.begin == begin && group.count == static_cast<int>(rows_of[i].size());
      for (int j = 0; good && j < group.count; ++j) good = rows.host[begin + j] == rows_of[i][j];
      begin += group.count;
    }
    int64_t in_tiles = 0;
    for (const RowTile& tile : tiles.host) in_tiles += tile.count;
    check(good && in_tiles == begin, name + ": rows by adapter");
    std::vector<int> in_parts(kAdapters), empty_firsts(kAdapters);
    for (const RowTile& part : parts.host) {
      good = good && part.first % kRowsOfParts == 0 && part.count <= kRowsOfParts &&
             part.begin == groups.host[part.adapter].begin + part.first;
      in_parts[part.adapter] += part.count;
      empty_firsts[part.adapter] += part.count == 0 && part.first == 0;
    }
    for (int i = 0; i < kAdapters; ++i) {
      good = good && in_parts[i] == groups.host[i].count && empty_firsts[i] == (groups.host[i].count == 0);
    }
    check(good, name + ": parts by adapter");
  }

  double tolerance() const { return sizeof(TX) == 8 ? 1e-12 : sizeof(TX) == 4 ? 1e-5 : 1.0 / 64; }

  // drop(x) a^T of the row at a place of an adapter
  double product(int adapter, int64_t place, int r) const {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += dropped(adapter, place, k) * a_of(adapter, r, k);
    return dropout_scale() * sum;
  }

  void check_forward(const MultiLoraPass& pass) {
    TestMatrix<S> parts(multi_lora_splits(K) * M, kRank, kRank, 0);
    std::vector<S> whole;
    std::vector<TX> whole_y;
    const std::vector<TX> before = y.host;
    for (const int splits : {1, multi_lora_splits(K)}) {
      y.host = before;
      MultiLoraShrink shrink{pass, false, 0, 1, K, x.as_rows(), splits, nullptr};
      shrink.parts = splits == 1 ? s.to_device() : parts.to_device();
      launch_multi_lora_shrink(shrink, nullptr);
      if (splits == 1)
        s.to_host();
      else
        parts.to_host();
      MultiLoraExpand expand{};
      expand.pass = pass;
      expand.slices = 1;
      expand.parts = splits == 1 ? s.to_device() : parts.to_device();
      expand.splits = splits;
      expand.s = s.to_device();
      expand.n[0] = N;
      expand.out[0] = y.to_device();
      expand.ld_out[0] = y.ld;
      launch_multi_lora_expand(expand, nullptr);
      s.to_host(), y.to_host();
      if (splits == 1) whole = s.host, whole_y = y.host;
    }
    check(std::memcmp(whole.data(), s.host.data(), whole.size() * sizeof(S)) == 0 &&
              std::memcmp(whole_y.data(), y.host.data(), whole_y.size() * sizeof(TX)) == 0,
          name + ": the same bits in parts");
    TestMatrix<double> expected(M, N, N, 0);
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t n = 0; n < N; ++n) expected.host[i * N + n] = to_float(before[i * y.ld + n]);
    }
    for (int i = 0; i < kAdapters; ++i) {
      for (size_t place = 0; place < rows_of[i].size(); ++place) {
        for (int r = 0; r < rank(i); ++r) {
          const double value = scale(i) * product(i, place, r);
          for (int64_t n = 0; n < N; ++n) expected.host[rows_of[i][place] * N + n] += value * b_of(i, n, r);
        }
      }
    }
    compare(
        name + ": y", M, N, tolerance(), [&](int64_t i, int64_t j) { return y.at(i, j); },
        [&](int64_t i, int64_t j) { return expected.at(i, j); });
  }

  void check_backward(const MultiLoraPass& pass) {
    MultiLoraShrink shrink{pass, true, 0, 1, N, dy.as_rows(), 1, ds.to_device()};
    launch_multi_lora_shrink(shrink, nullptr);
    ds.to_host();
    std::fill(dx.host.begin(), dx.host.end(), from_double<TX>(0.0));
    MultiLoraExpand expand{};
    expand.pass = pass;
    expand.backward = true;
    expand.slices = expand.splits = 1;
    expand.parts = ds.to_device();
    expand.n[0] = expand.ld_out[0] = K;
    expand.out[0] = dx.to_device();
    launch_multi_lora_expand(expand, nullptr);
    TestVector<S> part_sums(std::max<int64_t>(part_slots(M, kRowsOfParts) * kRank * std::max(K, N), 1), 0);
    launch_multi_lora_reduce({pass, true, 0, K, x.as_rows(), ds.to_device(), part_sums.to_device()}, nullptr);
    launch_multi_lora_reduce({pass, false, 0, N, dy.as_rows(), s.to_device(), part_sums.to_device()}, nullptr);
    dx.to_host(), grad_a.to_host(), grad_b.to_host();

    TestMatrix<double> of_x(M, K, K, 0);
    std::fill(of_x.host.begin(), of_x.host.end(), 0.0);
    for (int i = 0; i < kAdapters; ++i) {
      const int R = rank(i);
      if (R == 0) continue;
      TestMatrix<double> of_a(R, K, K, 0), of_b(N, R, R, 0);
      std::fill(of_a.host.begin(), of_a.host.end(), 0.0), std::fill(of_b.host.begin(), of_b.host.end(), 0.0);
      for (size_t place = 0; place < rows_of[i].size(); ++place) {
        const int row = rows_of[i][place];
        for (int r = 0; r < R; ++r) {
          double u = 0;
          const double of_s = scale(i) * product(i, place, r);
          for (int64_t n = 0; n < N; ++n) {
            u += dy.at(row, n) * b_of(i, n, r);
            of_b.host[n * R + r] += dy.at(row, n) * of_s;
          }
          u *= scale(i) * dropout_scale();
          for (int64_t k = 0; k < K; ++k) {
            of_a.host[r * K + k] += u * dropped(i, place, k);
            if (keeps(kSeed, threshold(), place, k)) of_x.host[row * K + k] += u * a_of(i, r, k);
          }
        }
      }
      const std::string which = name + " adapter " + std::to_string(i);
      const TC *a_at = grad_a.host.data() + i * kRank * K, *b_at = grad_b.host.data() + i * N * kRank;
      compare(
          which + ": da", R, K, tolerance(), [&](int64_t r, int64_t k) { return to_float(a_at[r * K + k]); },
          [&](int64_t r, int64_t k) { return of_a.at(r, k); });
      compare(
          which + ": db", N, R, tolerance(), [&](int64_t n, int64_t r) { return to_float(b_at[n * R + r]); },
          [&](int64_t n, int64_t r) { return of_b.at(n, r); });
    }
    compare(
        name + ": dx", M, K, tolerance(), [&](int64_t i, int64_t j) { return dx.at(i, j); },
        [&](int64_t i, int64_t j) { return of_x.at(i, j); });
  }
};

// More adapters than a grid has blocks in y; the last one has all rows, in two parts.
void check_many_adapters() {
  constexpr int kMany = 65540, kRows = kRowsOfParts + 1;
  TestMatrix<float> dy(kRows, 1, 1, 1), s(kRows, 1, 1, 2), grad(1, 1, 1, 0), part_sums(2, 1, 1, 0);
  DeviceArray<int> index(kRows), rows(kRows);
  DeviceArray<RowGroup> groups(kMany);
  DeviceArray<RowTile> tiles(static_cast<size_t>(row_tiles(kRows, kMany)));
  DeviceArray<RowTile> parts(static_cast<size_t>(row_parts(kRows, kMany, kRowsOfParts)));
  DeviceArray<MultiAdapter> table(kMany);
  std::fill(index.host.begin(), index.host.end(), kMany - 1);
  MultiAdapter& last = table.host[kMany - 1];
  last.type_b = last.products = Dtype::kFloat32;
  last.scale = last.r = 1;
  last.grad_b = grad.to_device();
  const MultiLoraGroups sort = sorted(index, rows, groups, tiles, parts);
  MultiLoraPass pass{};
  pass.types = {Dtype::kFloat32, Dtype::kFloat32, false};
  pass.m = kRows;
  pass.rows = sort.rows;
  pass.groups = sort.groups;
  pass.table = table.to_device();
  pass.adapters = kMany;
  pass.max_rank = 1;
  pass.parts = sort.parts;
  pass.part_rows = sort.part_rows;
  launch_multi_lora_reduce({pass, false, 0, 1, dy.as_rows(), s.to_device(), part_sums.to_device()}, nullptr);
  grad.to_host();
  double expected = 0;
  for (int64_t i = 0; i < kRows; ++i) expected += dy.at(i, 0) * s.at(i, 0);
  check(std::abs(grad.at(0, 0) - expected) < 1e-4, "multi_lora: the last of many adapters");
}

}  // namespace
}  // namespace pyfused

int main() {
  using namespace pyfused;
  run_with_all_types<MultiLoraTest>(Shape{9, 530, 67});  // two splits, a few rows
  const Shape several_tiles{270, 70, 130};               // and parts
  run_with_types<MultiLoraTest>("bf16", Dtype::kBFloat16, Dtype::kBFloat16, several_tiles);
  run_with_types<MultiLoraTest>("fp32", Dtype::kFloat32, Dtype::kFloat32, several_tiles);
  run_with_types<MultiLoraTest>("fp64", Dtype::kFloat64, Dtype::kFloat64, several_tiles);
  if constexpr (kHasFp16) check_many_adapters();  // under a sanitizer so many blocks take minutes
  return exit_status();
}
