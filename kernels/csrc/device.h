// What the bindings ask of the device the kernels run on.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

int mmtrain_processors(void);               // streaming multiprocessors of the current device
const char* mmtrain_error_text(int error);  // of a launcher's return value

#ifdef __cplusplus
}
#endif
