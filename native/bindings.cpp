// The Python module thrifty._native: what comes from Python is turned into the engine's own types here, nowhere else.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "executor.h"
#include "kernels/dispatch.h"
#include "sharing.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using thrifty::Limits;
using thrifty::Source;

using Array = nb::ndarray<nb::ro, nb::device::cpu>;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message + "."); }

template <class T>
T value(nb::handle object, const char* what) {
    T result;
    if (!nb::try_cast<T>(object, result)) fail(std::string(what) + " is of the wrong type or out of range");
    return result;
}

// Integers, true and false excluded.
std::int64_t integer(nb::handle object, const char* what) {
    if (PyBool_Check(object.ptr()) || !nb::isinstance<nb::int_>(object)) fail(std::string(what) + " must be an integer");
    return value<std::int64_t>(object, what);
}

nb::sequence sequence(nb::handle object, const char* what) {
    if (!nb::isinstance<nb::tuple>(object) && !nb::isinstance<nb::list>(object)) fail(std::string(what) + " must be a tuple or a list");
    return nb::borrow<nb::sequence>(object);
}

std::vector<std::int64_t> integers(nb::handle object, const char* what) {
    std::vector<std::int64_t> result;
    for (nb::handle item : sequence(object, what)) result.push_back(integer(item, what));
    return result;
}

thrifty::Attribute attribute(nb::handle object) {
    constexpr const char* what = "an operator's attribute";
    if (nb::isinstance<nb::str>(object)) return value<std::string>(object, what);
    if (nb::isinstance<nb::float_>(object)) return value<double>(object, what);
    if (nb::isinstance<nb::int_>(object)) return integer(object, what);
    return integers(object, what);
}

nb::dict dict(nb::handle object, const char* what) {
    if (!nb::isinstance<nb::dict>(object)) fail(std::string(what) + " must be a dict");
    return nb::borrow<nb::dict>(object);
}

// Keeps the arrays alive that its tensors point into.
struct Loaded {
    Source source;
    std::vector<Array> arrays;
};

// In C order without gaps.
bool contiguous(const Array& array) {
    std::int64_t expected = 1;
    for (std::size_t d = array.ndim(); d-- > 0;) {
        if (array.shape(d) != 1 && array.stride(d) != expected) return false;
        expected *= static_cast<std::int64_t>(array.shape(d));
    }
    return true;
}

thrifty::TensorSource tensor(nb::handle object, const std::string& role, std::vector<Array>& kept) {
    Array array;
    if (!nb::try_cast<Array>(object, array)) fail("tensor '" + role + "' is not an array in this machine's memory");
    thrifty::TensorSource result;
    result.contiguous = contiguous(array);
    for (std::size_t d = 0; d < array.ndim(); ++d) result.shape.push_back(static_cast<std::int64_t>(array.shape(d)));
    if (array.dtype() == nb::dtype<float>()) result.type = thrifty::TensorSource::Type::float32;
    if (array.dtype() == nb::dtype<std::int32_t>()) result.type = thrifty::TensorSource::Type::int32;
    result.data = array.data();
    kept.push_back(std::move(array));
    return result;
}

Loaded load(nb::handle buffers, nb::handle operators, nb::handle output) {
    Loaded loaded;
    for (nb::handle shape : sequence(buffers, "buffers")) loaded.source.buffers.push_back(integers(shape, "a buffer's shape"));
    for (nb::handle item : sequence(operators, "operators")) {
        const nb::sequence fields = sequence(item, "an operator");
        if (nb::len(fields) != 7)
            fail("an operator must have seven fields: kind, name, inputs, output, attributes, tensors, guard");
        thrifty::OperatorSource op;
        op.kind = value<std::string>(fields[0], "an operator's kind");
        op.name = value<std::string>(fields[1], "an operator's name");
        op.inputs = integers(fields[2], "an operator's inputs");
        op.output = integer(fields[3], "an operator's output");
        for (auto [name, found] : dict(fields[4], "an operator's attributes"))
            op.attributes[value<std::string>(name, "an attribute's name")] = attribute(found);
        for (auto [role, array] : dict(fields[5], "an operator's tensors")) {
            const auto name = value<std::string>(role, "a tensor's role");
            op.tensors[name] = tensor(array, name, loaded.arrays);
        }
        op.guard = integer(fields[6], "an operator's guard");
        loaded.source.operators.push_back(std::move(op));
    }
    loaded.source.output = integer(output, "output");
    return loaded;
}

Limits limits_of(nb::handle object) {
    Limits limits;
    if (object.is_none()) return limits;
    for (auto [key, found] : dict(object, "limits")) {
        const auto name = value<std::string>(key, "a limit's name");
        const std::int64_t limit = integer(found, "a limit");
        if (limit < 1) fail("limit '" + name + "' must be positive");
        if (name == "memory") limits.memory = limit;
        else if (name == "macs") limits.macs = limit;
        else fail("there is no limit '" + name + "'; known are memory (bytes) and macs");
    }
    return limits;
}

// (place, name, value) each.
thrifty::Changes changes_of(nb::handle object) {
    thrifty::Changes changes;
    for (nb::handle item : sequence(object, "changes")) {
        const nb::sequence parts = sequence(item, "a change");
        if (nb::len(parts) != 3) fail("a change must have three parts: an operator's place, a setting's name, its value");
        changes.push_back({integer(parts[0], "an operator's place"), value<std::string>(parts[1], "a setting's name"),
                           value<double>(parts[2], "a setting's value")});
    }
    return changes;
}

thrifty::Normalisation normalisation_of(nb::handle mean, nb::handle deviation) {
    thrifty::Normalisation result;
    if (mean.is_none() && deviation.is_none()) return result;
    const auto means = value<std::vector<double>>(mean, "mean"), deviations = value<std::vector<double>>(deviation, "std");
    if (means.size() != deviations.size() || means.empty()) fail("mean and std must have as many numbers as the input has channels");
    for (std::size_t c = 0; c < means.size(); ++c) {
        if (!(deviations[c] > 0)) fail("std must be positive");
        result.scale.push_back(static_cast<float>(1 / (255 * deviations[c])));
        result.shift.push_back(static_cast<float>(-means[c] / deviations[c]));
    }
    return result;
}

template <class T, class... Size>
nb::object numpy(std::vector<T> values, Size... sizes) {
    auto* const kept = new std::vector<T>(std::move(values));
    const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(kept->data(), {static_cast<std::size_t>(sizes)...}, owner));
}

class PyEngine {
public:
    PyEngine(nb::handle buffers, nb::handle operators, nb::handle output, int threads, nb::handle limits, nb::handle mean,
             nb::handle deviation)
        : loaded_(load(buffers, operators, output)),
          engine_(loaded_.source, limits_of(limits), threads, normalisation_of(mean, deviation)) {}

    void run(const Array& x, const nb::ndarray<float, nb::c_contig, nb::device::cpu>& out, nb::handle decisions, bool channels_last) {
        thrifty::Images images = images_of(x, channels_last);
        check_out(out, images.count);
        std::vector<Array> kept;
        const thrifty::Forced forced = forced_of(decisions, images.count, kept);
        float* const to = out.data();
        const nb::gil_scoped_release released;
        engine_.run(images, to, forced);
    }

    nb::dict trace(const Array& x, const nb::ndarray<float, nb::c_contig, nb::device::cpu>& out, nb::handle decisions, bool channels_last,
                   nb::handle changes) {
        const thrifty::Images images = images_of(x, channels_last);
        check_out(out, images.count);
        std::vector<Array> kept;
        const thrifty::Forced forced = forced_of(decisions, images.count, kept);
        const thrifty::Changes own = changes_of(changes);
        thrifty::Trace trace;
        float* const to = out.data();
        {
            const nb::gil_scoped_release released;
            engine_.run(images, to, forced, &trace, own);
        }
        nb::list ms, gate_ms, macs, gate_macs, kernels;
        nb::dict decided;
        for (std::size_t i = 0; i < trace.operators.size(); ++i) {
            auto& op = trace.operators[i];
            ms.append(op.ms);
            gate_ms.append(op.gate_ms);
            macs.append(numpy(std::move(op.macs), images.count));
            gate_macs.append(numpy(std::move(op.gate_macs), images.count));
            kernels.append(op.kernel);
            if (gated(i)) decided[nb::int_(i)] = decisions_of(op, i, images.count);
        }
        nb::dict result;
        result["total_ms"] = trace.ms;
        result["ms"] = ms;
        result["gate_ms"] = gate_ms;
        result["macs"] = macs;
        result["gate_macs"] = gate_macs;
        result["kernels"] = kernels;
        result["decisions"] = decided;
        return result;
    }

    // The settings of all gates by their names in programs, by place.
    nb::dict settings() {
        nb::dict result;
        const auto found = engine_.settings();
        for (std::size_t i = 0; i < found.size(); ++i) {
            if (!gated(i)) continue;
            nb::dict own;
            switch (engine_.program().operators[i].gate) {
                case thrifty::Gate::none: break;
                case thrifty::Gate::topk: own["winners"] = found[i].channels; break;
                case thrifty::Gate::attention:
                    own["kept_channels"] = found[i].channels;
                    own["kept_columns"] = found[i].columns;
                    break;
                case thrifty::Gate::clip:
                case thrifty::Gate::layer: own["threshold"] = found[i].threshold; break;
            }
            result[nb::int_(i)] = own;
        }
        return result;
    }

    void set(nb::handle changes) { engine_.set(changes_of(changes)); }

    thrifty::Engine& engine() { return engine_; }

private:
    bool gated(std::size_t i) const { return engine_.program().operators[i].gate != thrifty::Gate::none; }

    // (channels [N, C], columns [N, H, W], layer [N]), None for axes that are not decided.
    nb::object decisions_of(thrifty::OperatorTrace& op, std::size_t i, std::int64_t images) const {
        const thrifty::Shape& x = engine_.program().buffers[static_cast<std::size_t>(engine_.program().operators[i].inputs[0])];
        nb::list found;
        for (std::size_t axis = 0; axis < thrifty::axes; ++axis) {
            const int marks = op.marks[axis];
            if (!marks) {
                found.append(nb::none());
                continue;
            }
            nb::object array;
            switch (static_cast<thrifty::Axis>(axis)) {
                case thrifty::Axis::channels: array = numpy(std::move(op.decisions[axis]), images, marks); break;
                case thrifty::Axis::columns: array = numpy(std::move(op.decisions[axis]), images, x.height, x.width); break;
                case thrifty::Axis::layer: array = numpy(std::move(op.decisions[axis]), images); break;
            }
            found.append(array.attr("view")("bool"));
        }
        return nb::tuple(found);
    }

    thrifty::Images images_of(const Array& x, bool channels_last) const {
        const thrifty::Shape& shape = engine_.program().buffers[0];
        const std::vector<std::int64_t> sizes = channels_last ? std::vector<std::int64_t>{shape.height, shape.width, shape.channels}
                                                              : std::vector<std::int64_t>{shape.channels, shape.height, shape.width};
        bool fits = x.ndim() == 4;
        for (std::size_t d = 0; fits && d < 3; ++d) fits = static_cast<std::int64_t>(x.shape(d + 1)) == sizes[d];
        if (!fits)
            fail("the input must be [N, " + std::to_string(sizes[0]) + ", " + std::to_string(sizes[1]) + ", " + std::to_string(sizes[2]) + "]");
        thrifty::Images images;
        images.bytes = x.dtype() == nb::dtype<std::uint8_t>();
        if (!images.bytes && x.dtype() != nb::dtype<float>()) fail("the input must be float32 or uint8");
        if (images.bytes && !engine_.normalises()) fail("the program has no preprocessing, so the input must be float32, not uint8");
        if (!images.bytes && reinterpret_cast<std::uintptr_t>(x.data()) % sizeof(float) != 0) fail("the input is not aligned");
        images.data = x.data();
        images.count = static_cast<std::int64_t>(x.shape(0));
        images.image = x.stride(0);
        images.channel = x.stride(channels_last ? 3 : 1);
        images.row = x.stride(channels_last ? 1 : 2);
        images.column = x.stride(channels_last ? 2 : 3);
        return images;
    }

    void check_out(const nb::ndarray<float, nb::c_contig, nb::device::cpu>& out, std::int64_t count) const {
        const auto& program = engine_.program();
        const auto size = program.buffers[static_cast<std::size_t>(program.output)].size();
        if (out.ndim() < 1 || static_cast<std::int64_t>(out.shape(0)) != count || static_cast<std::int64_t>(out.size()) != count * size)
            fail("out must hold " + std::to_string(size) + " values for each of the " + std::to_string(count) + " images");
    }

    thrifty::Forced forced_of(nb::handle decisions, std::int64_t count, std::vector<Array>& kept) {
        thrifty::Forced forced;
        if (decisions.is_none()) return forced;
        forced.resize(engine_.program().operators.size(), {});
        const auto settings = engine_.settings();
        for (auto [key, object] : dict(decisions, "decisions")) {
            const std::int64_t place = integer(key, "an operator's place in decisions");
            const auto i = static_cast<std::size_t>(place);
            if (place < 0 || i >= forced.size() || !gated(i)) fail("operator " + std::to_string(place) + " in decisions has no gate");
            const nb::sequence given = sequence(object, "a decision");
            if (nb::len(given) != thrifty::axes) fail("a decision must have three parts: channels, columns, layer");
            const auto marks = thrifty::decided(engine_.program(), engine_.program().operators[i], settings[i]);
            for (std::size_t axis = 0; axis < thrifty::axes; ++axis) {
                const nb::object part = given[axis];
                if (part.is_none()) continue;
                Array array;
                if (!marks[axis] || !nb::try_cast<Array>(part, array) || array.dtype() != nb::dtype<bool>() || array.ndim() < 1 ||
                    static_cast<std::int64_t>(array.shape(0)) != count ||
                    static_cast<std::int64_t>(array.size()) != count * marks[axis] || (count > 0 && !contiguous(array)))
                    fail("the decisions of operator " + std::to_string(place) + " must be bool, " + std::to_string(count) + " times " +
                         std::to_string(marks[axis]) + " values, contiguous");
                forced[i][axis] = static_cast<const std::uint8_t*>(array.data());
                kept.push_back(std::move(array));
            }
        }
        return forced;
    }

    Loaded loaded_;
    thrifty::Engine engine_;
};

nb::dict features() {
    nb::dict result;
    result["isa"] = thrifty::kernels().isa;
    nb::list available;
    for (const char* isa : thrifty::available_isas()) available.append(isa);
    result["available"] = available;
#ifdef THRIFTY_SANITIZED
    result["sanitized"] = true;
#else
    result["sanitized"] = false;
#endif
    return result;
}

void check(nb::handle buffers, nb::handle operators, nb::handle output, nb::handle limits) {
    const Loaded loaded = load(buffers, operators, output);
    const Limits found = limits_of(limits);
    thrifty::make_plan(thrifty::validate(loaded.source, found), found);
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // engines that live until the interpreter ends are no leak
    m.doc() = "The native engine. Use thrifty.Engine.";
    m.def("features", &features);
    m.def("check", &check, "buffers"_a, "operators"_a, "output"_a, "limits"_a = nb::none());
    nb::class_<thrifty::Sharing>(m, "Sharing")  // for tests
        .def(nb::init<>())
        .def_prop_ro("shares", &thrifty::Sharing::shares)
        .def("took", &thrifty::Sharing::took, "seconds"_a, "now"_a);
    nb::class_<PyEngine>(m, "Engine")
        .def(nb::init<nb::handle, nb::handle, nb::handle, int, nb::handle, nb::handle, nb::handle>(), "buffers"_a,
             "operators"_a, "output"_a, "threads"_a = 1, "limits"_a = nb::none(), "mean"_a = nb::none(), "std"_a = nb::none())
        .def("run", &PyEngine::run, "x"_a, "out"_a.noconvert(), "decisions"_a = nb::none(), "channels_last"_a = false)
        .def("trace", &PyEngine::trace, "x"_a, "out"_a.noconvert(), "decisions"_a = nb::none(), "channels_last"_a = false,
             "changes"_a = nb::tuple())
        .def("set", &PyEngine::set, "changes"_a)
        .def("settings", &PyEngine::settings)
        .def("fill_memory", [](PyEngine& self, float value) { self.engine().fill_memory(value); }, "value"_a)
        .def_prop_ro("threads", [](PyEngine& self) { return self.engine().threads(); })
        .def_prop_ro("isa", [](PyEngine& self) { return self.engine().isa(); })
        .def_prop_ro("arena_bytes", [](PyEngine& self) { return self.engine().arena_bytes(); });
}
