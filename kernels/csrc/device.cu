#include "device.h"

#include "simt.h"

extern "C" int mmtrain_processors(void) { return SIMT_PROCESSORS(); }

extern "C" const char* mmtrain_error_text(int error) {
    if (error < 0) return "not supported by the kernel";
    return SIMT_ERROR_TEXT(error);
}
