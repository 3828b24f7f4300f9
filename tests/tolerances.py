"""Every tolerance of the suite, with the reason for its size."""

# One op, float64 arithmetic on both sides: rounding of a few operations.
OP_FLOAT64 = {"rtol": 1e-12, "atol": 1e-14}
# One op in float32 against torch's own float32: the order of operations differs.
OP_FLOAT32 = {"rtol": 2e-6, "atol": 1e-7}
# 50 training steps in float64. Adam divides by sqrt(v) of single elements, which lifts the rounding
# of gradients whose true value is near zero.
TRAINING_FLOAT64 = {"rtol": 1e-7, "atol": 1e-9}
# Orthonormality of a basis computed in float32 by Householder QR.
ORTHONORMAL_FLOAT32 = 1e-5
# Entries of |W| * norm this close (relatively) to the outlier threshold may fall on either side:
# the float32 activations behind the norm depend on the shape of the batch.
OUTLIER_NEAR = 2e-6
# A few training steps in float32, the same operations in another grouping.
TRAINING_FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
# 30 steps in float32 beside galore-torch: it applies the bias corrections to the step size, we to
# the moments, and an SVD's vectors carry rounding of 1e-7 over the gap of singular values.
GALORE_FLOAT32 = {"rtol": 1e-5, "atol": 3e-6}
# Relative error (norm) of the low-rank step's moments beside twice the reference's: float32
# products as three tf32 products, and sums of bfloat16 products in tensor cores, which drop low
# bits.
LOWRANK_FLOAT32 = 3e-7
LOWRANK_TENSOR_CORES = 4e-6
# 30 steps of the projected and the dense path on the same bases, relative (norm), for each weight:
# the order of the sums differs, and with bfloat16 weights or autocast the dense path rounds G once.
PROJECTED_FLOAT32 = 1e-5
PROJECTED_BFLOAT16 = 2e-2
