// Operators of domain "segzero" for ONNX Runtime: loaded by `SessionOptions.register_custom_ops_library`.
//
// Graphs carry each operator's meaning in ONNX Runtime's own operators as a function; where this library is registered,
// its kernels stand in for those.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <exception>

#include "attention.hpp"
#include "mlp.hpp"
#include "ort_abi.hpp"
#include "split_linear.hpp"

namespace segzero {
namespace {

using namespace ort;

const Api* api = nullptr;

struct Failed {
    Status* status;
};

void check(Status* status) {
    if (status != nullptr) throw Failed{status};
}

void expect(bool holds, const char* message) {
    if (!holds) throw Failed{api->status(message)};
}

template <typename Call>
Status* guarded(Call call) {
    try {
        call();
        return nullptr;
    } catch (const Failed& failed) {
        return failed.status;
    } catch (const std::exception& error) {
        return api->status(error.what());
    }
}

std::vector<int64_t> sides_of(const Value* value) {
    Shape* shape = nullptr;
    check(api->shape(value, &shape));
    size_t count = 0;
    Status* status = api->num_dimensions(shape, &count);
    std::vector<int64_t> sides(count);
    if (status == nullptr) status = api->dimensions(shape, sides.data(), count);
    api->release(shape);
    check(status);
    return sides;
}

template <typename T>
T* data_of(const Value* value) {
    void* data = nullptr;
    check(api->data(const_cast<Value*>(value), &data));
    return static_cast<T*>(data);
}

const Value* input_of(const Context* context, size_t index) {
    const Value* value = nullptr;
    check(api->input(context, index, &value));
    return value;
}

// Of [rows, width].
size_t rows_of(const Value* x, size_t width) {
    const std::vector<int64_t> sides = sides_of(x);
    expect(sides.size() == 2 && sides[1] == static_cast<int64_t>(width), "expected rows of the layer's width");
    return sides[0];
}

float* output_of(Context* context, const std::vector<int64_t>& sides) {
    Value* value = nullptr;
    check(api->output(context, 0, sides.data(), sides.size(), &value));
    return data_of<float>(value);
}

const Value* constant_of(const Info* info, size_t index) {
    const Value* value = nullptr;
    int is_constant = 0;
    check(api->constant_input(info, index, &is_constant, &value));
    expect(is_constant != 0, "expected weights that are constants");
    return value;
}

std::vector<float> vector_of(const Info* info, size_t index, size_t length) {
    const Value* value = constant_of(info, index);
    expect(sides_of(value) == std::vector<int64_t>{static_cast<int64_t>(length)}, "expected a vector of a layer's width");
    const float* data = data_of<float>(value);
    return std::vector<float>(data, data + length);
}

// Calls `call(unit)` for all units, on as many threads as the session has.
template <typename Call>
void for_each(const Context* context, size_t units, Call call) {
    const auto plain = [](void* data, size_t unit) { (*static_cast<Call*>(data))(unit); };
    if (units == 1) return call(0);
    check(api->parallel_for(context, plain, units, &call));
}

void expect_tiles(const std::vector<int64_t>& sides) {
    expect(sides.size() == 2 && sides[0] > 0 && sides[0] % kSide == 0 && sides[1] % kSide == 0,
           "expected a weight with two sides that 16 divides");
}

// Reads a layer from inputs `index` on, which is moved behind them: weight [depth, columns], scale (int8 alone), bias.
// Of `every` such layers of one size, side by side in turns of 16 columns, it is number `place`.
template <typename T>
void read_linear(const Info* info, size_t& index, Linear& linear, size_t every = 1, size_t place = 0) {
    constexpr bool kScaled = sizeof(T) == 1;
    const Value* value = constant_of(info, index++);
    const std::vector<int64_t> sides = sides_of(value);
    expect_tiles(sides);
    const size_t depth = sides[0], columns = sides[1];
    expect(place == 0 || (depth == linear.depth && columns * every == linear.columns), "expected layers that fit");
    linear.depth = depth;
    linear.columns = columns * every;
    linear.scale.resize(linear.columns);
    linear.bias.resize(linear.columns);
    const size_t tiles = linear.depths() * kTile;
    Bfloat16* packed = linear.weight.grow(linear.columns / kSide * tiles);
    pack_weight(data_of<const T>(value), depth, columns, packed + place * tiles, every);
    const std::vector<float> scale = kScaled ? vector_of(info, index++, columns) : std::vector<float>(columns, 1.0f);
    const std::vector<float> bias = vector_of(info, index++, columns);
    for (size_t column = 0; column < columns; ++column) {
        const size_t to = (column / kSide * every + place) * kSide + column % kSide;
        linear.scale[to] = scale[column];
        linear.bias[to] = bias[column];
    }
}

// Inputs: x, norm's scale and bias (the latter not where gated), then the layers: first or gate and up, second.
template <typename T, bool kGated>
struct MlpKernel {
    static constexpr bool kScaled = sizeof(T) == 1;
    static constexpr const char* kName = kGated ? "Int8GatedMlp" : kScaled ? "Int8Mlp" : "Mlp";
    static constexpr size_t kFirst = kGated ? 2 : 3, kLayer = kScaled ? 3 : 2;
    static constexpr size_t kInputs = kFirst + kLayer * (kGated ? 3 : 2);

    Mlp mlp;

    static int input_type(size_t index) {
        return kScaled && index >= kFirst && (index - kFirst) % kLayer == 0 ? kInt8 : kFloat;
    }

    explicit MlpKernel(const Info* info) {
        size_t index = kFirst;
        mlp.gated = kGated;
        read_linear<T>(info, index, mlp.first, kGated ? 2 : 1);
        if (kGated) read_linear<T>(info, index, mlp.first, 2, 1);
        read_linear<T>(info, index, mlp.second);
        Norm& norm = mlp.norm;
        norm.width = mlp.first.depth;
        const bool fit = mlp.second.depth * (kGated ? 2 : 1) == mlp.first.columns && mlp.second.columns == norm.width;
        expect(fit, "expected layers that fit");
        check(api->attribute(info, "epsilon", &norm.epsilon));
        norm.scale = vector_of(info, 1, norm.width);
        if (!kGated) norm.shift = vector_of(info, 2, norm.width);
    }

    void compute(Context* context) const {
        const Value* x = input_of(context, 0);
        const size_t rows = rows_of(x, mlp.norm.width);
        const float* from = data_of<float>(x);
        float* to = output_of(context, sides_of(x));
        if (rows > 0) for_each(context, up(rows, kRows), [&](size_t block) { mlp.run(from, to, rows, block); });
    }
};

// Inputs: queries, keys, values, [batch, rows, heads * width] each. Two names of one kernel, whose functions differ.
template <bool kOneHead>
struct AttentionKernel {
    static constexpr const char* kName = kOneHead ? "HeadAttention" : "Attention";
    static constexpr size_t kInputs = 3;

    int64_t heads = 0;
    float scale = 0;

    static int input_type(size_t) { return kFloat; }

    explicit AttentionKernel(const Info* info) {
        check(api->attribute(info, "num_heads", &heads));
        check(api->attribute(info, "scale", &scale));
        expect(heads > 0 && (heads == 1 || !kOneHead), "expected at least one head, or one alone");
    }

    void compute(Context* context) const {
        const Value* inputs[] = {input_of(context, 0), input_of(context, 1), input_of(context, 2)};
        const std::vector<int64_t> query = sides_of(inputs[0]), key = sides_of(inputs[1]), value = sides_of(inputs[2]);
        const bool fit = query.size() == 3 && key.size() == 3 && value.size() == 3 && query[0] == key[0] &&
                         key[0] == value[0] && query[2] == key[2] && key[1] == value[1];
        expect(fit, "expected queries, keys and values that fit");
        const int64_t step = heads * static_cast<int64_t>(kSide);
        expect(query[2] % step == 0 && value[2] % step == 0 && key[1] > 0, "expected heads whose width 16 divides");
        Attention attention;
        attention.heads = heads;
        attention.queries = query[1];
        attention.keys = key[1];
        attention.key_width = query[2] / heads;
        attention.value_width = value[2] / heads;
        attention.scale = scale;
        const float *from[] = {data_of<float>(inputs[0]), data_of<float>(inputs[1]), data_of<float>(inputs[2])};
        float* to = output_of(context, {query[0], query[1], value[2]});
        const size_t units = query[0] * heads;
        if (units > 0)
            for_each(context, units, [&](size_t unit) { attention.run(from[0], from[1], from[2], to, unit); });
    }
};

// Reads a layer from input `index`, weight [depth, columns], and the next one, its bias.
void read_split(const Info* info, size_t index, bool biased, SplitLinear& linear) {
    const Value* value = constant_of(info, index);
    const std::vector<int64_t> sides = sides_of(value);
    expect_tiles(sides);
    linear.depth = sides[0];
    linear.columns = sides[1];
    linear.pack(data_of<const float>(value));
    if (biased) linear.bias = vector_of(info, index + 1, linear.columns);
}

// Inputs: x [rows, depth], weight [depth, columns], bias if it has one.
template <bool kBiased>
struct SplitKernel {
    static constexpr const char* kName = kBiased ? "SplitLinear" : "SplitProduct";
    static constexpr size_t kInputs = kBiased ? 3 : 2;

    SplitLinear linear;

    static int input_type(size_t) { return kFloat; }

    explicit SplitKernel(const Info* info) { read_split(info, 1, kBiased, linear); }

    void compute(Context* context) const {
        const Value* x = input_of(context, 0);
        const size_t rows = rows_of(x, linear.depth), blocks = up(rows, SplitLinear::kBlockRows);
        const float* from = data_of<float>(x);
        float* to = output_of(context, {static_cast<int64_t>(rows), static_cast<int64_t>(linear.columns)});
        if (rows > 0) for_each(context, blocks, [&](size_t block) { linear.run(from, to, rows, block); });
    }
};

// Inputs: x, norm's scale and bias, then weight and bias of both layers.
struct SplitMlpKernel {
    static constexpr const char* kName = "SplitMlp";
    static constexpr size_t kInputs = 7;

    SplitMlp mlp;

    static int input_type(size_t) { return kFloat; }

    explicit SplitMlpKernel(const Info* info) {
        read_split(info, 3, true, mlp.first);
        read_split(info, 5, true, mlp.second);
        expect(mlp.second.depth == mlp.first.columns && mlp.second.columns == mlp.first.depth, "expected layers that fit");
        Norm& norm = mlp.norm;
        norm.width = mlp.first.depth;
        check(api->attribute(info, "epsilon", &norm.epsilon));
        norm.scale = vector_of(info, 1, norm.width);
        norm.shift = vector_of(info, 2, norm.width);
    }

    void compute(Context* context) const {
        const Value* x = input_of(context, 0);
        const size_t rows = rows_of(x, mlp.norm.width), blocks = up(rows, SplitLinear::kBlockRows);
        const float* from = data_of<float>(x);
        float* to = output_of(context, sides_of(x));
        if (rows > 0) for_each(context, blocks, [&](size_t block) { mlp.run(from, to, rows, block); });
    }
};

template <typename Kernel>
const CustomOp* described() {
    static const CustomOp op = [] {
        CustomOp made{};
        made.version = kApiVersion;
        made.name = [](const CustomOp*) { return Kernel::kName; };
        made.provider = [](const CustomOp*) -> const char* { return nullptr; };
        made.input_type = [](const CustomOp*, size_t index) { return Kernel::input_type(index); };
        made.num_inputs = [](const CustomOp*) { return Kernel::kInputs; };
        made.output_type = [](const CustomOp*, size_t) -> int { return kFloat; };
        made.num_outputs = [](const CustomOp*) -> size_t { return 1; };
        made.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        made.input_characteristic = [](const CustomOp*, size_t) { return 0; };
        made.output_characteristic = [](const CustomOp*, size_t) { return 0; };
        made.input_memory = [](const CustomOp*, size_t) { return 0; };
        made.variadic_input_min = made.variadic_output_min = [](const CustomOp*) { return 1; };
        made.variadic_input_same = made.variadic_output_same = [](const CustomOp*) { return 1; };
        made.create_checked = [](const CustomOp*, const Api*, const Info* info, void** kernel) {
            return guarded([&] { *kernel = new Kernel(info); });
        };
        made.compute_checked = [](void* kernel, Context* context) {
            return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
        };
        made.start_version = [](const CustomOp*) { return 1; };
        made.end_version = [](const CustomOp*) { return 1; };
        return made;
    }();
    return &op;
}

// Linux lends the tiles' registers to processes that ask: Documentation/arch/x86/xstate.rst.
bool tiles_allowed() {
    constexpr int kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace
}  // namespace segzero

// Read by `library.py` without loading the library.
extern "C" __attribute__((visibility("default"))) const char segzero_operator_sources[];
const char segzero_operator_sources[] = "segzero sources " SEGZERO_SOURCES;

extern "C" __attribute__((visibility("default"))) int segzero_tiles_allowed() { return segzero::tiles_allowed(); }

extern "C" __attribute__((visibility("default"))) segzero::ort::Status* RegisterCustomOps(
    segzero::ort::SessionOptions* options, const segzero::ort::ApiBase* base) {
    using namespace segzero;
    const ort::Api* found = base->api(ort::kApiVersion);
    if (found == nullptr) return nullptr;  // older than the interface: the functions in the graph do as well
    api = found;
    return guarded([&] {
        expect(tiles_allowed(), "expected Linux to lend AMX's registers");
        static ort::Domain* domain = [] {
            ort::Domain* made = nullptr;
            check(api->create_domain("segzero", &made));
            for (const ort::CustomOp* op : {described<MlpKernel<float, false>>(), described<MlpKernel<int8_t, false>>(),
                                            described<MlpKernel<int8_t, true>>(), described<AttentionKernel<false>>(),
                                            described<AttentionKernel<true>>(), described<SplitKernel<false>>(),
                                            described<SplitKernel<true>>(), described<SplitMlpKernel>()})
                check(api->add_operator(made, op));
            return made;
        }();
        check(api->add_domain(options, domain));
    });
}
