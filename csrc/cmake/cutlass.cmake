# Finds CUTLASS for the kernels that need it, and compiles them.
#
# Sets ZM_WITH_SM100, ZM_WITH_SM120 and ZM_CUTLASS_VERSION, and defines zm_cutlass_library().

set(ZM_CUTLASS_DIR "" CACHE PATH "Folder of CUTLASS 4.2 or newer: include/cutlass is in it")
set(ZM_WITH_SM100 OFF)
set(ZM_WITH_SM120 OFF)
set(ZM_CUTLASS_VERSION "")

# ZM_CUTLASS_DIR, then an installed package, then the Python package nvidia-cutlass.
function(zm_find_cutlass out)
  if(ZM_CUTLASS_DIR)
    find_path(found cutlass/version.h PATHS "${ZM_CUTLASS_DIR}/include" "${ZM_CUTLASS_DIR}"
                                            NO_DEFAULT_PATH NO_CACHE)
  else()
    find_path(found cutlass/version.h NO_CACHE)
    if(NOT found)
      find_package(Python QUIET COMPONENTS Interpreter)
      if(Python_FOUND)
        execute_process(
          COMMAND
            "${Python_EXECUTABLE}" -c
            "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
          OUTPUT_VARIABLE package
          ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
        find_path(found cutlass/version.h PATHS "${package}/source/include" NO_DEFAULT_PATH
                                                NO_CACHE)
      endif()
    endif()
  endif()
  set(${out} "${found}" PARENT_SCOPE)
endfunction()

if("100f" IN_LIST ZM_CUDA_TARGETS OR "120f" IN_LIST ZM_CUDA_TARGETS)
  zm_find_cutlass(zm_cutlass_include)
  if(zm_cutlass_include)
    file(STRINGS "${zm_cutlass_include}/cutlass/version.h" zm_lines REGEX "define CUTLASS_(MAJOR|MINOR|PATCH)")
    string(REGEX MATCHALL "[0-9]+" zm_numbers "${zm_lines}")
    list(JOIN zm_numbers "." ZM_CUTLASS_VERSION)
  endif()
  if(ZM_CUTLASS_VERSION VERSION_GREATER_EQUAL 4.2)
    message(STATUS "CUTLASS: ${ZM_CUTLASS_VERSION}")
    foreach(number 100 120)
      if("${number}f" IN_LIST ZM_CUDA_TARGETS)
        set(ZM_WITH_SM${number} ON)
      endif()
    endforeach()
  else()
    if(ZM_CUTLASS_VERSION)
      set(zm_why "the CUTLASS that was found is ${ZM_CUTLASS_VERSION}, and 4.2 is needed")
    else()
      set(zm_why "CUTLASS was not found")
    endif()
    set(ZM_CUTLASS_VERSION "")
    set(zm_remedy "set ZM_CUTLASS_DIR to its folder, install it where CMake looks, or run pip "
                  "install nvidia-cutlass==4.2.0.0 (pip install with ZM_CUDA=ON in the environment "
                  "does that by itself)")
    string(CONCAT zm_remedy ${zm_remedy})
    if(ZM_CUDA STREQUAL "ON" OR "100f" IN_LIST zm_named OR "120f" IN_LIST zm_named)
      message(FATAL_ERROR "100f and 120f need CUTLASS 4.2 or newer, and ${zm_why}: ${zm_remedy}")
    endif()
    message(STATUS "No kernels for 100f and 120f, because ${zm_why}: ${zm_remedy}")
    list(REMOVE_ITEM ZM_CUDA_TARGETS 100f 120f)
  endif()
endif()

# A compile takes a minute and up to 6 GB: one at a time.
set_property(GLOBAL APPEND PROPERTY JOB_POOLS zm_cutlass=1)

# One kernel: block_scaled.cu for a tile and an output type.
function(zm_cutlass_library)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "ARCH;CONFIG;OUTPUT" "")
  set(type_BF16 cutlass::bfloat16_t)
  set(type_F32 float)
  set(target zm_gemm_${arg_CONFIG}_${arg_OUTPUT})
  string(TOLOWER ${target} target)
  zm_cuda_library(${target} ARCH ${arg_ARCH} SOURCES gemm/blackwell/block_scaled.cu)
  set_target_properties(${target} PROPERTIES JOB_POOL_COMPILE zm_cutlass)
  target_include_directories(${target} SYSTEM PRIVATE ${zm_cutlass_include})
  # NDEBUG in every build type: assertions keep ptxas from overlapping the tensor cores' work.
  target_compile_options(${target} PRIVATE -O3 -DNDEBUG)
  target_compile_definitions(
    ${target} PRIVATE ZM_CONFIG=${arg_CONFIG} ZM_OUTPUT=${type_${arg_OUTPUT}}
                      ZM_VARIANT=k${arg_CONFIG}${arg_OUTPUT})
endfunction()
