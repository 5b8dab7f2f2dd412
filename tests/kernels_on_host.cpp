// All kernels as a library that tests/host_device.py loads in the place of a device's code.
#include "cuda_on_host.hpp"
//
#include "../segzero_rt/kernels/parse_prompts.cu"
#include "../segzero_rt/kernels/postprocess_masks.cu"
#include "../segzero_rt/kernels/preprocess.cu"
#include "../segzero_rt/kernels/sample_token.cu"

constexpr bool kInTurn = false, kTogether = true;

HOST_LAUNCH(parse_prompts_kernel, kInTurn)
HOST_LAUNCH(upsample_masks_kernel, kInTurn)
HOST_LAUNCH(resample_columns_kernel, kInTurn)
HOST_LAUNCH(resample_rows_kernel, kInTurn)
HOST_LAUNCH(sample_token_kernel, kTogether)
