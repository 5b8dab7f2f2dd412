// What of ONNX Runtime's C interface the operators use: https://onnxruntime.ai/docs/api/c/struct_ort_api.html
//
// That interface is a table of functions which only ever grows at its end, so a place in it means the same function in
// every version. Declaring the dozen that are called spares every build ONNX Runtime's headers, which its wheels lack.
#pragma once

#include <cstddef>
#include <cstdint>

namespace segzero::ort {

constexpr uint32_t kApiVersion = 17;  // the first with ParallelFor; ONNX Runtime 1.17

struct Status;
struct Value;
struct Info;  // a node, while its kernel is made
struct Context;  // a run of a node
struct Shape;
struct Domain;
struct SessionOptions;
struct CustomOp;

struct Api {
    void* functions[320];

    template <typename Function>
    Function at(size_t place) const { return reinterpret_cast<Function>(functions[place]); }

    Status* status(const char* message) const { return at<Status* (*)(int, const char*)>(0)(1, message); }
    Status* create_domain(const char* name, Domain** out) const {
        return at<Status* (*)(const char*, Domain**)>(26)(name, out);
    }
    Status* add_operator(Domain* domain, const CustomOp* op) const {
        return at<Status* (*)(Domain*, const CustomOp*)>(27)(domain, op);
    }
    Status* add_domain(SessionOptions* options, Domain* domain) const {
        return at<Status* (*)(SessionOptions*, Domain*)>(28)(options, domain);
    }
    Status* data(Value* value, void** out) const { return at<Status* (*)(Value*, void**)>(51)(value, out); }
    Status* num_dimensions(const Shape* shape, size_t* out) const {
        return at<Status* (*)(const Shape*, size_t*)>(61)(shape, out);
    }
    Status* dimensions(const Shape* shape, int64_t* out, size_t count) const {
        return at<Status* (*)(const Shape*, int64_t*, size_t)>(62)(shape, out, count);
    }
    Status* shape(const Value* value, Shape** out) const {
        return at<Status* (*)(const Value*, Shape**)>(65)(value, out);
    }
    Status* attribute(const Info* info, const char* name, float* out) const {
        return at<Status* (*)(const Info*, const char*, float*)>(85)(info, name, out);
    }
    Status* attribute(const Info* info, const char* name, int64_t* out) const {
        return at<Status* (*)(const Info*, const char*, int64_t*)>(86)(info, name, out);
    }
    Status* input(const Context* context, size_t index, const Value** out) const {
        return at<Status* (*)(const Context*, size_t, const Value**)>(90)(context, index, out);
    }
    Status* output(Context* context, size_t index, const int64_t* sides, size_t count, Value** out) const {
        return at<Status* (*)(Context*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, sides, count, out);
    }
    void release(Shape* shape) const { at<void (*)(Shape*)>(99)(shape); }
    Status* constant_input(const Info* info, size_t index, int* is_constant, const Value** out) const {
        return at<Status* (*)(const Info*, size_t, int*, const Value**)>(249)(info, index, is_constant, out);
    }
    Status* parallel_for(const Context* context, void (*call)(void*, size_t), size_t total, void* data) const {
        using Function = Status* (*)(const Context*, void (*)(void*, size_t), size_t, size_t, void*);
        return at<Function>(274)(context, call, total, total, data);
    }
};

struct ApiBase {
    const Api* (*api)(uint32_t version);
    const char* (*version)();
};

enum ElementType { kFloat = 1, kInt8 = 3 };

// Fields in ONNX Runtime's order; what a version of its own does not know yet, it does not read.
struct CustomOp {
    uint32_t version;
    void* (*create)(const CustomOp*, const Api*, const Info*);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    int (*input_type)(const CustomOp*, size_t);
    size_t (*num_inputs)(const CustomOp*);
    int (*output_type)(const CustomOp*, size_t);
    size_t (*num_outputs)(const CustomOp*);
    void (*compute)(void*, Context*);
    void (*destroy)(void*);
    int (*input_characteristic)(const CustomOp*, size_t);
    int (*output_characteristic)(const CustomOp*, size_t);
    int (*input_memory)(const CustomOp*, size_t);
    int (*variadic_input_min)(const CustomOp*);
    int (*variadic_input_same)(const CustomOp*);
    int (*variadic_output_min)(const CustomOp*);
    int (*variadic_output_same)(const CustomOp*);
    Status* (*create_checked)(const CustomOp*, const Api*, const Info*, void**);
    Status* (*compute_checked)(void*, Context*);
    Status* (*infer_shape)(const CustomOp*, void*);
    int (*start_version)(const CustomOp*);
    int (*end_version)(const CustomOp*);
    size_t (*may_in_place)(int**, int**);
    void (*release_in_place)(int*, int*);
    size_t (*aliases)(int**, int**);
    void (*release_aliases)(int*, int*);
};

}  // namespace segzero::ort
