#include "program.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <set>
#include <string_view>
#include <utility>

#include "fields.h"

namespace thrifty {
namespace {

using std::int64_t;
using std::string;

constexpr int64_t max_pixels = 1 << 28;     // height * width
constexpr int64_t max_operators = 20'000;

struct Spec {
    const char* name;
    Kind kind;
    int inputs;  // -1: one or more; conv: one or two
    std::initializer_list<std::string_view> attributes;
    std::initializer_list<std::string_view> tensors;
};

const Spec specs[] = {
    {"conv", Kind::conv, -1,
     {"stride", "padding", "dilation", "groups", "activation", "slope", "gate", "winners", "threshold",
      "kept_channels", "kept_columns", "scaled"},
     {"weight", "bias", "gate_weight", "gate_bias"}},
    {"linear", Kind::linear, 1, {"activation", "slope"}, {"weight", "bias"}},
    {"affine", Kind::affine, 1, {"activation", "slope"}, {"scale", "shift"}},
    {"activation", Kind::activation, 1, {"activation", "slope"}, {}},
    {"add", Kind::add, 2, {"activation", "slope"}, {}},
    {"mul", Kind::mul, 2, {"activation", "slope"}, {}},
    {"concat", Kind::concat, -1, {}, {}},
    {"gather", Kind::gather, 1, {}, {"index"}},
    {"max_pool", Kind::max_pool, 1, {"kernel", "stride", "padding", "dilation"}, {}},
    {"avg_pool", Kind::avg_pool, 1, {"kernel", "stride", "padding", "count_include_pad", "divisor"}, {}},
    {"adaptive_avg_pool", Kind::adaptive_avg_pool, 1, {}, {}},
    {"adaptive_max_pool", Kind::adaptive_max_pool, 1, {}, {}},
    {"pad", Kind::pad, 1, {"padding", "value"}, {}},
    {"layer_norm", Kind::layer_norm, 1, {"epsilon"}, {"weight", "bias"}},
    {"flatten", Kind::flatten, 1, {}, {}},
    {"layer_gate", Kind::layer_gate, 1, {"threshold"}, {"weight", "bias"}},
};

constexpr std::pair<std::string_view, Activation> activations[] = {
    {"none", Activation::none}, {"relu", Activation::relu}, {"relu6", Activation::relu6},
    {"leaky_relu", Activation::leaky_relu}, {"silu", Activation::silu}, {"gelu", Activation::gelu},
    {"gelu_tanh", Activation::gelu_tanh}, {"hardswish", Activation::hardswish}, {"sigmoid", Activation::sigmoid},
    {"hardsigmoid", Activation::hardsigmoid}, {"tanh", Activation::tanh},
};

constexpr std::pair<std::string_view, Gate> gates[] = {
    {"topk", Gate::topk}, {"clip", Gate::clip}, {"attention", Gate::attention},
};

int64_t product(const std::vector<int64_t>& sizes) {  // saturates; sizes are not negative
    int64_t result = 1;
    for (const int64_t size : sizes)
        if (__builtin_mul_overflow(result, size, &result)) return std::numeric_limits<int64_t>::max();
    return result;
}

int64_t sum(int64_t a, int64_t b) {
    int64_t result;
    return __builtin_add_overflow(a, b, &result) ? std::numeric_limits<int64_t>::max() : result;
}

// Reads one operator of the source and checks it against the shapes of its buffers.
class Reader : private Fields {
public:
    Reader(const OperatorSource& source, std::size_t place, const std::vector<Shape>& buffers)
        : Fields(source, place), buffers_(buffers) {}

    // `layer_gates`: for each buffer, whether a layer_gate has written it.
    Operator read(const std::vector<bool>& written, const std::vector<bool>& layer_gates) {
        const Spec& spec = find_spec();
        op_.kind = spec.kind;
        op_.name = source_.name;
        read_edges(spec, written);
        read_guard(layer_gates);
        check_names(spec);
        read_activation();
        switch (spec.kind) {
            case Kind::conv: conv(); break;
            case Kind::linear: linear(); break;
            case Kind::affine: affine(); break;
            case Kind::activation: same(in(), "its input"); break;
            case Kind::add:
            case Kind::mul: binary(); break;
            case Kind::concat: concat(); break;
            case Kind::gather: gather(); break;
            case Kind::max_pool:
            case Kind::avg_pool: pool(); break;
            case Kind::adaptive_avg_pool:
            case Kind::adaptive_max_pool: adaptive(); break;
            case Kind::pad: pad(); break;
            case Kind::layer_norm: layer_norm(); break;
            case Kind::flatten: flatten(); break;
            case Kind::layer_gate: layer_gate(); break;
        }
        if (op_.work == 0) op_.work = std::max(in().size(), out().size());
        return std::move(op_);
    }

private:
    const Shape& in(std::size_t i = 0) const { return buffers_[static_cast<std::size_t>(op_.inputs[i])]; }
    const Shape& out() const { return buffers_[static_cast<std::size_t>(op_.output)]; }

    const Spec& find_spec() const {
        for (const Spec& spec : specs)
            if (source_.kind == spec.name) return spec;
        string known;
        for (const Spec& spec : specs) known += string(known.empty() ? "" : ", ") + spec.name;
        wrong("there is no such kind of operator; known are " + known);
    }

    void read_edges(const Spec& spec, const std::vector<bool>& written) {
        const auto buffers = static_cast<int64_t>(buffers_.size());
        const std::size_t count = source_.inputs.size();
        const bool conv = spec.kind == Kind::conv;
        if (spec.inputs < 0) require(count >= 1 && (!conv || count <= 2), "it has " + std::to_string(count) +
                                     " inputs, but takes " + (conv ? "one or two" : "one or more"));
        else require(count == static_cast<std::size_t>(spec.inputs), "it has " + std::to_string(count) +
                     " inputs, but takes " + std::to_string(spec.inputs));
        for (const int64_t input : source_.inputs) {
            require(input >= 0 && input < buffers, "input buffer " + std::to_string(input) + " does not exist");
            require(written[static_cast<std::size_t>(input)],
                    "buffer " + std::to_string(input) + " is read before any operator has written it");
            op_.inputs.push_back(static_cast<int>(input));
        }
        require(source_.output > 0 && source_.output < buffers,
                "output buffer " + std::to_string(source_.output) + " does not exist or is the program's input");
        require(!written[static_cast<std::size_t>(source_.output)],
                "buffer " + std::to_string(source_.output) + " is written twice");
        op_.output = static_cast<int>(source_.output);
    }

    void read_guard(const std::vector<bool>& layer_gates) {
        if (source_.guard == -1) return;
        require(source_.guard >= 0 && source_.guard < static_cast<int64_t>(layer_gates.size()),
                "its guard, buffer " + std::to_string(source_.guard) + ", does not exist");
        require(layer_gates[static_cast<std::size_t>(source_.guard)],
                "its guard, buffer " + std::to_string(source_.guard) + ", was not written by a layer_gate before it");
        require(op_.kind != Kind::layer_gate, "a layer_gate cannot have a guard");
        op_.guard = static_cast<int>(source_.guard);
    }

    void check_names(const Spec& spec) const {
        const auto has = [](auto names, const string& name) {
            return std::find(names.begin(), names.end(), name) != names.end();
        };
        for (const auto& [name, value] : source_.attributes)
            require(has(spec.attributes, name), "it takes no attribute '" + shown(name) + "'");
        for (const auto& [role, tensor] : source_.tensors)
            require(has(spec.tensors, role), "it takes no tensor '" + shown(role) + "'");
    }

    void read_activation() {
        if (const auto* name = attribute<string>("activation", "a string")) {
            const auto* found = std::find_if(std::begin(activations), std::end(activations),
                                             [&](const auto& known) { return known.first == *name; });
            require(found != std::end(activations), "there is no activation '" + shown(*name) + "'");
            op_.activation = found->second;
        }
        op_.slope = static_cast<float>(number("slope", 0.01));
    }

    void read_padding() {
        const auto padding = integers("padding", 4, 0, 0);
        op_.padding = {padding[0], padding[1], padding[2], padding[3]};
    }

    void read_window(int kernel_height, int kernel_width, int default_stride) {
        op_.kernel_height = kernel_height;
        op_.kernel_width = kernel_width;
        const auto stride = integers("stride", 2, 1, default_stride);
        const auto dilation = integers("dilation", 2, 1, 1);
        op_.stride_height = stride[0], op_.stride_width = stride[1];
        op_.dilation_height = dilation[0], op_.dilation_width = dilation[1];
        read_padding();
    }

    // ---- kinds

    void same(const Shape& shape, const char* what) const {
        require(out() == shape, "its output is " + text(out()) + ", but must be " + text(shape) + " like " + what);
    }

    // Sizes of a window's output: rounded down, or where `ceiling` is allowed also up.
    void check_extent(const char* what, int size, int before, int after, int kernel, int dilation, int stride,
                      int found, bool ceiling) const {
        const int64_t reach = int64_t{dilation} * (kernel - 1) + 1;
        const int64_t room = int64_t{size} + before + after - reach;
        require(room >= 0, string("its window of ") + std::to_string(reach) + " is larger than the padded " + what +
                " of " + std::to_string(room + reach));
        const int64_t down = room / stride + 1;
        const int64_t up = (room + stride - 1) / stride + 1;
        const bool fits = found == down || (ceiling && found == up && (up - 1) * stride < int64_t{size} + before);
        require(fits, string("its output has ") + what + " " + std::to_string(found) + ", but the window gives " +
                std::to_string(down));
    }

    void check_window(bool ceiling) const {
        check_extent("height", in().height, op_.padding.top, op_.padding.bottom, op_.kernel_height,
                     op_.dilation_height, op_.stride_height, out().height, ceiling);
        check_extent("width", in().width, op_.padding.left, op_.padding.right, op_.kernel_width,
                     op_.dilation_width, op_.stride_width, out().width, ceiling);
    }

    void conv() {
        const Shape x = in(), y = out();
        const auto weight = source_.tensors.find("weight");
        require(weight != source_.tensors.end(), "tensor 'weight' is missing");
        const auto& shape = weight->second.shape;
        require(shape.size() == 4 && std::all_of(shape.begin(), shape.end(), [](int64_t n) {
                    return n >= 1 && n <= max_extent; }),
                "tensor 'weight' is " + text(shape) + ", but must be [output channels, input channels / groups, "
                "kernel height, kernel width]");
        read_window(static_cast<int>(shape[2]), static_cast<int>(shape[3]), 1);
        op_.groups = integer("groups", 1, max_extent, 1);
        require(x.channels % op_.groups == 0 && y.channels % op_.groups == 0, std::to_string(op_.groups) +
                " groups do not divide its " + std::to_string(x.channels) + " input and " +
                std::to_string(y.channels) + " output channels");
        op_.weight = floats("weight", {y.channels, x.channels / op_.groups, shape[2], shape[3]});
        op_.bias = floats("bias", {y.channels});
        check_window(false);
        if (op_.inputs.size() == 2)
            require(in(1) == y, "its residual is " + text(in(1)) + ", but its output " + text(y));
        op_.work = product({shape[1], shape[2], shape[3], y.channels, y.pixels()});
        op_.scaled = integer("scaled", 0, 1, 0) == 1;
        require(!op_.scaled || op_.guard >= 0, "it is scaled by its guard, but has none");
        gate();
    }

    void gate() {
        const Shape x = in(), y = out();
        if (const auto* name = attribute<string>("gate", "a string")) {
            const auto found = std::find_if(std::begin(gates), std::end(gates),
                                            [&](const auto& known) { return known.first == *name; });
            require(found != std::end(gates), "there is no gate '" + shown(*name) + "'");
            op_.gate = found->second;
        }
        const auto only = [&](Gate kind, const char* name) {
            const bool found = given(name);
            require(!found || op_.gate == kind, string("attribute '") + name + "' does not belong to its gate");
            return found;
        };
        const auto needs = [&](Gate kind, const char* name, int64_t most) {
            if (only(kind, name)) return integer(name, 1, most, 0);
            require(op_.gate != kind, string("it is gated, but attribute '") + name + "' is missing");
            return 0;
        };
        const int winners = needs(Gate::topk, "winners", y.channels);
        const int channels = needs(Gate::attention, "kept_channels", x.channels);
        op_.settings.columns = needs(Gate::attention, "kept_columns", x.pixels());
        op_.settings.channels = std::max(winners, channels);
        if (only(Gate::clip, "threshold")) read_threshold();
        if (op_.gate == Gate::attention) op_.work = sum(op_.work, 2 * x.size());
        if (op_.gate == Gate::topk || op_.gate == Gate::clip) {
            op_.gate_weight = floats("gate_weight", {y.channels, x.channels});
            op_.gate_bias = floats("gate_bias", {y.channels});
            op_.work = sum(op_.work, sum(x.size(), int64_t{x.channels} * y.channels));
        } else {
            require(!has("gate_weight") && !has("gate_bias"), "it has the tensors of a gate, but no such gate");
        }
    }

    void read_threshold() {
        op_.settings.threshold = number("threshold", 0);
        require(op_.settings.threshold >= 0 && op_.settings.threshold < 1, "attribute 'threshold' must be in [0, 1)");
    }

    void linear() {
        require(in().vector() && out().vector(), "it takes a vector (F, 1, 1) to a vector, not " + text(in()) +
                " to " + text(out()));
        op_.weight = floats("weight", {out().channels, in().channels});
        op_.bias = floats("bias", {out().channels});
        op_.work = int64_t{out().channels} * in().channels;
    }

    void affine() {
        same(in(), "its input");
        op_.scale = floats("scale", {in().channels});
        if (has("shift")) op_.shift = floats("shift", {in().channels});
    }

    void binary() {
        const Shape a = in(0), b = in(1);
        same(a, "its first input");
        const bool fits = b == a || b == Shape{a.channels, 1, 1} ||
                          (op_.kind == Kind::mul && (b == Shape{1, a.height, a.width} || b == Shape{1, 1, 1}));
        require(fits, "its inputs " + text(a) + " and " + text(b) + " do not go together");
    }

    void concat() {
        int64_t channels = 0;
        for (std::size_t i = 0; i < op_.inputs.size(); ++i) {
            require(in(i).height == out().height && in(i).width == out().width,
                    "its input " + text(in(i)) + " and its output " + text(out()) + " differ in height or width");
            channels = sum(channels, in(i).channels);
        }
        require(channels == out().channels, "its inputs have " + std::to_string(channels) +
                " channels together, but its output " + std::to_string(out().channels));
    }

    void gather() {
        same({out().channels, in().height, in().width}, "its input in height and width");
        const auto* index = static_cast<const std::int32_t*>(
            tensor("index", TensorSource::Type::int32, {out().channels}));
        op_.index = {index, static_cast<std::size_t>(out().channels)};
        for (const int c : op_.index)
            if (c < -1 || c >= in().channels)
                wrong("its index " + std::to_string(c) + " is not in [-1, " + std::to_string(in().channels - 1) + "]");
    }

    void pool() {
        const auto kernel = integers("kernel", 2, 1, -1);
        read_window(kernel[0], kernel[1], 1);
        if (op_.kind == Kind::avg_pool) {
            op_.count_include_pad = integer("count_include_pad", 0, 1, 1) == 1;
            op_.divisor = integer("divisor", 0, max_extent, 0);
        }
        const auto& p = op_.padding;
        require(std::max(p.top, p.bottom) < kernel[0] && std::max(p.left, p.right) < kernel[1],
                "its padding is not smaller than its kernel");
        require(in().channels == out().channels, "its output has another number of channels than its input");
        check_window(true);
        op_.work = product({kernel[0], kernel[1], out().channels, out().pixels()});
    }

    void adaptive() {
        require(in().channels == out().channels, "its output has another number of channels than its input");
        op_.work = sum(in().size(), product({out().channels, out().pixels(), in().height / out().height + 2,
                                             in().width / out().width + 2}));
    }

    void pad() {
        read_padding();
        op_.value = static_cast<float>(number("value", 0));
        const auto& p = op_.padding;
        same({in().channels, in().height + p.top + p.bottom, in().width + p.left + p.right}, "its padded input");
    }

    void layer_norm() {
        same(in(), "its input");
        op_.epsilon = static_cast<float>(number("epsilon", 1e-5));
        require(op_.epsilon >= 0, "attribute 'epsilon' must not be negative");
        op_.weight = floats("weight", {in().channels});
        op_.bias = floats("bias", {in().channels});
    }

    void flatten() {
        require(out().vector() && out().channels == in().size(),
                "it takes " + text(in()) + " to " + text(out()) + ", but must give a vector of all values");
    }

    void layer_gate() {
        require(out() == Shape{1, 1, 1}, "its output is " + text(out()) + ", but must be [1, 1, 1]");
        op_.gate = Gate::layer;
        op_.weight = floats("weight", {1, in().channels});
        op_.bias = floats("bias", {1});
        read_threshold();
        op_.work = sum(in().size(), in().channels);
    }

    const std::vector<Shape>& buffers_;
    Operator op_;
};

Shape read_shape(const std::vector<int64_t>& sizes, std::size_t place, const Limits& limits) {
    const string where = "buffer " + std::to_string(place) + " of shape " + text(sizes) + " ";
    if (sizes.size() != 3) fail(where + "must have three sizes: channels, height, width");
    for (const int64_t size : sizes)
        if (size < 1 || size > max_extent) fail(where + "has a size that is not in [1, " + std::to_string(max_extent) + "]");
    if (sizes[1] * sizes[2] > max_pixels) fail(where + "has more than " + std::to_string(max_pixels) + " positions");
    if (product(sizes) > limits.memory / 4) fail(where + "takes more than the limit of " + std::to_string(limits.memory) + " bytes");
    return {static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), static_cast<int>(sizes[2])};
}

// At most so many floats of weights an operator keeps in an order of its own, beside those of the source.
int64_t kept(const Operator& op, const std::vector<Shape>& buffers) {
    constexpr int64_t widest = 64;  // outputs that are padded to lie side by side
    const Shape &in = buffers[static_cast<std::size_t>(op.inputs[0])], &out = buffers[static_cast<std::size_t>(op.output)];
    const auto padded = [&](int64_t outputs) { return (outputs + widest - 1) / widest * widest; };
    if (op.kind == Kind::linear) return product({padded(out.channels), in.channels});
    if (op.kind != Kind::conv) return 0;
    const int64_t ins = in.channels / op.groups, taps = int64_t{op.kernel_height} * op.kernel_width;
    int64_t floats = taps == 9 ? product({out.channels, ins, 16}) : 0;  // transformed 3x3 filters
    if (op.gate == Gate::topk || op.gate == Gate::clip) floats = sum(floats, product({padded(out.channels), in.channels}));
    if (op.gate == Gate::attention) {
        floats = sum(floats, product({op.groups, padded(out.channels / op.groups), ins, taps}));
        floats = sum(floats, product({op.kernel_width, in.width}));
    }
    return floats;
}

}  // namespace

Program validate(const Source& source, const Limits& limits) {
    if (static_cast<int64_t>(source.operators.size()) > max_operators)
        fail("the program has " + std::to_string(source.operators.size()) + " operators, but at most " +
             std::to_string(max_operators) + " are allowed");
    if (source.buffers.size() != source.operators.size() + 1)
        fail("the program has " + std::to_string(source.buffers.size()) + " buffers and " +
             std::to_string(source.operators.size()) + " operators, but each operator must write one buffer of its own");
    Program program;
    for (const auto& sizes : source.buffers)
        program.buffers.push_back(read_shape(sizes, program.buffers.size(), limits));
    std::vector<bool> written(program.buffers.size(), false), layer_gates(program.buffers.size(), false);
    written[0] = true;
    int64_t work = 0;
    std::set<const void*> seen;
    int64_t given = 0, keeping = 0;  // floats: of different tensors, and that operators keep of them
    for (const auto& op : source.operators) {
        for (const auto& [role, tensor] : op.tensors)
            if (seen.insert(tensor.data).second) given = sum(given, product(tensor.shape));
        program.operators.push_back(Reader(op, program.operators.size(), program.buffers).read(written, layer_gates));
        written[static_cast<std::size_t>(op.output)] = true;
        layer_gates[static_cast<std::size_t>(op.output)] = program.operators.back().kind == Kind::layer_gate;
        keeping = sum(keeping, kept(program.operators.back(), program.buffers));
        work = sum(work, program.operators.back().work);
        if (work > limits.macs)
            fail("operator " + std::to_string(program.operators.size() - 1) + " (" + shown(op.kind) + " '" + shown(op.name) +
                 "'): the program needs more than the limit of " + std::to_string(limits.macs) + " MACs up to here");
    }
    if (keeping / 4 > given && keeping > limits.memory / 4)
        fail("what operators keep of their weights, each in its own order, takes more than the limit of " +
             std::to_string(limits.memory) + " bytes");
    if (source.output < 0 || source.output >= static_cast<int64_t>(program.buffers.size()))
        fail("the program's output is buffer " + std::to_string(source.output) + ", which does not exist");
    program.output = static_cast<int>(source.output);
    return program;
}

}  // namespace thrifty
