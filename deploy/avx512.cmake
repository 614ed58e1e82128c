# A second libggml-cpu for x86-64 processors with AVX-512; llama-cpp-python's build includes this by install-llama-cpp.
#
# In: ggml's own target ggml-cpu, which is compiled for AVX2. Out: the same sources with AVX-512, in the folder where
# glibc 2.33 and later looks first on a processor that has it: lib/glibc-hwcaps/x86-64-v4. Elsewhere nobody opens it.
# Never AMX: GCC 12 compiles ggml's code for it to an illegal instruction.

function(quantize_add_avx512)
  if(GGML_NATIVE OR GGML_AVX512 OR GGML_BACKEND_DL) # the caller chose instructions, or how to choose them
    return()
  endif()
  find_package(OpenMP) # ggml's own search is not seen from here
  get_target_property(folder ggml-cpu SOURCE_DIR)
  get_target_property(sources ggml-cpu SOURCES)
  list(TRANSFORM sources PREPEND "${folder}/")
  add_library(ggml-cpu-avx512 SHARED ${sources})
  foreach(property COMPILE_DEFINITIONS COMPILE_OPTIONS COMPILE_FEATURES INCLUDE_DIRECTORIES LINK_LIBRARIES
                   C_STANDARD CXX_STANDARD)
    get_target_property(value ggml-cpu ${property})
    if(value)
      set_property(TARGET ggml-cpu-avx512 PROPERTY ${property} "${value}")
    endif()
  endforeach()
  get_directory_property(definitions DIRECTORY "${folder}" COMPILE_DEFINITIONS)
  target_compile_definitions(ggml-cpu-avx512 PRIVATE ${definitions})
  target_compile_options(ggml-cpu-avx512 PRIVATE -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl)
  get_target_property(version ggml-cpu SOVERSION)
  set_target_properties(ggml-cpu-avx512 PROPERTIES
    OUTPUT_NAME ggml-cpu SUFFIX ".so.${version}" INSTALL_RPATH "$ORIGIN/../.." BUILD_WITH_INSTALL_RPATH TRUE
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/avx512")
  install(TARGETS ggml-cpu-avx512 LIBRARY DESTINATION "${SKBUILD_PLATLIB_DIR}/llama_cpp/lib/glibc-hwcaps/x86-64-v4")
endfunction()

cmake_language(DEFER CALL quantize_add_avx512)
