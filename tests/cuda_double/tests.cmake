# Tests of the emulation itself. The emulation is built before the product's folders, its tests after them.
foreach(part kernels streams cublas)
  antiphon_test(cuda_double_${part} SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_double_${part}.cpp
    LIBRARIES antiphon_cuda_double LABELS unit TIMEOUT 60)
endforeach()
# The fibres of other processors, by ucontext.
antiphon_test(cuda_double_ucontext SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_double_kernels.cpp
  LIBRARIES antiphon_cuda_double_ucontext LABELS unit TIMEOUT 60)
antiphon_test(cuda_double_nccl SOURCES ${CMAKE_CURRENT_LIST_DIR}/test_double_nccl.cpp
  LIBRARIES antiphon_cuda_double MPI::MPI_C LABELS ranks RANKS 1 2 4 TIMEOUT 60)
