// The gradient of attention over histories of codes: see code_attention.h, whose blocks it uses
// with two parts.
#pragma once

#include "code_attention.h"
