#include <algorithm>
#include <limits>
#include <utility>

#include "vectors.h"

namespace rf::cpu {
namespace {

// The loops keep positions along an axis in 32 bits, for wide gather loads.
Axis checked_axis(const char* op, int64_t in, int64_t out) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (in >= kLimit || out >= kLimit) {
    fail(op, ": height and width must be below ", kLimit, ", got ", in > out ? in : out);
  }
  return {in, out};
}

template <class A>
struct TapTable {
  std::vector<int32_t> first;
  std::vector<int32_t> second;
  std::vector<A> weight;

  TapTable(const Axis& axis, ResizeMode mode)
      : first(axis.out), second(axis.out), weight(axis.out) {
    for (int64_t i = 0; i < axis.out; ++i) {
      const Tap<A> tap = resize_tap<A>(i, axis.in, axis.out, mode);
      first[i] = static_cast<int32_t>(tap.first);
      second[i] = static_cast<int32_t>(tap.second);
      weight[i] = tap.weight;
    }
  }

  Taps view() const { return {first.data(), second.data(), weight.data()}; }
};

// The transpose of the taps of one axis: every input's outputs in ascending order.
template <class A>
struct GatherTable {
  int64_t terms = 0;
  std::vector<int32_t> source;
  std::vector<A> weight;

  GatherTable(const Axis& axis, ResizeMode mode) {
    std::vector<std::vector<std::pair<int32_t, A>>> lists(axis.in);
    const TapTable<A> taps(axis, mode);
    for (int32_t i = 0; i < axis.out; ++i) {
      const A share = taps.weight[i];
      if (share != A(1)) lists[taps.first[i]].emplace_back(i, A(1) - share);
      if (share != A(0)) lists[taps.second[i]].emplace_back(i, share);
    }
    for (const auto& list : lists) terms = std::max(terms, static_cast<int64_t>(list.size()));
    source.assign(terms * axis.in, static_cast<int32_t>(axis.out));
    weight.assign(terms * axis.in, A(0));
    for (int64_t i = 0; i < axis.in; ++i) {
      for (size_t k = 0; k < lists[i].size(); ++k) {
        source[k * axis.in + i] = lists[i][k].first;
        weight[k * axis.in + i] = lists[i][k].second;
      }
    }
  }

  Gather view() const { return {terms, source.data(), weight.data()}; }
};

void upsample_forward(
    const Tensor& input, const OptionalTensor& skip, int64_t mode, const Tensor& output) {
  const char* op = "upsample_forward";
  const ResizeMode resize = checked_mode(op, mode);
  const Images images = check_upsample_forward(input, skip, output);
  if (output.numel() == 0) return;
  const int64_t c = input.size(1), skip_channels = output.size(1) - c;
  Image image = image_of(output, images);
  image.c = c;
  const Axis rows = checked_axis(op, input.size(2), output.size(2));
  const Axis columns = checked_axis(op, input.size(3), output.size(3));
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const TapTable<A> row_taps(rows, resize), column_taps(columns, resize);
    kernels().resize[dtype_of(images.dtype())](
        {image, rows, columns, skip_channels, resize == kNearest, row_taps.view(),
         column_taps.view(), input.data_ptr(), pointer(skip), output.mutable_data_ptr()});
  };
  images.dtype() == ScalarType::Double ? run(0.0) : run(0.0f);
}

void upsample_backward(
    const Tensor& grad_output, int64_t mode, const Tensor& grad_input,
    const OptionalTensor& grad_skip) {
  const char* op = "upsample_backward";
  const ResizeMode resize = checked_mode(op, mode);
  const Images images = check_upsample_backward(grad_output, grad_input, grad_skip);
  if (grad_input.numel() + grad_output.numel() == 0) return;
  const int64_t c = grad_input.size(1), skip_channels = grad_output.size(1) - c;
  Image image = image_of(grad_output, images);
  image.c = c;
  const Axis rows = checked_axis(op, grad_input.size(2), grad_output.size(2));
  const Axis columns = checked_axis(op, grad_input.size(3), grad_output.size(3));
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const GatherTable<A> row_table(rows, resize), column_table(columns, resize);
    kernels().resize_grad[dtype_of(images.dtype())](
        {image, rows, columns, skip_channels, row_table.view(), column_table.view(),
         grad_output.data_ptr(), grad_input.mutable_data_ptr(), mutable_pointer(grad_skip)});
  };
  images.dtype() == ScalarType::Double ? run(0.0) : run(0.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("upsample_forward", RF_BOX(&upsample_forward));
  m.impl("upsample_backward", RF_BOX(&upsample_backward));
}

}  // namespace rf::cpu
