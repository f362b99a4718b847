// All update rules, for what must be said once for each of them.
#pragma once

#include "math/adadelta.h"
#include "math/adagrad.h"
#include "math/adam.h"
#include "math/lamb.h"
#include "math/lion.h"
#include "math/rmsprop.h"
#include "math/sgd.h"

// X(type, function): the rules that take one pass over memory. Lamb takes two.
#define EFFKERN_ONE_PASS_RULES(X) \
  X(Adam, adam)                   \
  X(Sgd, sgd)                     \
  X(Adagrad, adagrad)             \
  X(RmsProp, rmsprop)             \
  X(Adadelta, adadelta)           \
  X(Lion, lion)
