// All kernels as a library that tests/host_device.py loads in the place of a device's code.
#include "cuda_on_host.hpp"
//
#include "../segzero_rt/kernels/handover.cu"
#include "../segzero_rt/kernels/parse_prompts.cu"
#include "../segzero_rt/kernels/postprocess_masks.cu"
#include "../segzero_rt/kernels/preprocess.cu"
#include "../segzero_rt/kernels/sample_token.cu"

constexpr bool kInTurn = false, kTogether = true;

HOST_LAUNCH(place_prompts_kernel, kInTurn)
HOST_LAUNCH(choose_masks_kernel, kInTurn)
HOST_LAUNCH(find_tags_kernel, kTogether)
HOST_LAUNCH(parse_prompts_kernel, kInTurn)
HOST_LAUNCH(count_prompts_kernel, kTogether)
HOST_LAUNCH(pack_prompts_kernel, kInTurn)
HOST_LAUNCH(spell_tokens_kernel, kTogether)
HOST_LAUNCH(begin_masks_kernel, kInTurn)
HOST_LAUNCH(label_logits_kernel, kTogether)
HOST_LAUNCH(begin_components_kernel, kInTurn)
HOST_LAUNCH(join_components_kernel, kInTurn)
HOST_LAUNCH(measure_components_kernel, kInTurn)
HOST_LAUNCH(clean_logits_kernel, kInTurn)
HOST_LAUNCH(clean_masks_kernel, kTogether)
HOST_LAUNCH(upsample_masks_kernel, kTogether)
HOST_LAUNCH(finish_masks_kernel, kInTurn)
HOST_LAUNCH(count_changes_kernel, kInTurn)
HOST_LAUNCH(place_changes_kernel, kTogether)
HOST_LAUNCH(write_changes_kernel, kInTurn)
HOST_LAUNCH(write_runs_kernel, kTogether)
HOST_LAUNCH(axis_taps_kernel, kInTurn)
HOST_LAUNCH(resample_columns_kernel, kInTurn)
HOST_LAUNCH(resample_rows_kernel, kInTurn)
HOST_LAUNCH(sample_token_kernel, kTogether)
