# Where the C and C++ headers of ONNX Runtime are. Its Python wheels do not carry them.
#
#   apar_find_onnxruntime_headers(<directory> <reason>)
#
# sets <directory> to the folder that holds onnxruntime_c_api.h, or to nothing and <reason> to a sentence
# that says what to do. In this order:
#   1. ONNXRUNTIME_INCLUDE_DIR, a CMake or environment variable. Wrong is an error: a user's word is not ignored.
#   2. The system's include folders.
#   3. Debian and its kin: the package libonnxruntime-dev, fetched through the machine's own package source and
#      its signatures into the build tree. Nothing is installed. APAR_FETCH_HEADERS=OFF leaves this out.
include_guard(GLOBAL)

option(APAR_FETCH_HEADERS "Fetch the ONNX Runtime headers with apt-get where the system has none" ON)
set(ONNXRUNTIME_INCLUDE_DIR "" CACHE PATH "Folder with the headers of ONNX Runtime (onnxruntime_c_api.h)")

set(_apar_header onnxruntime_c_api.h)
set(_apar_header_folders onnxruntime onnxruntime/core/session core/session
                         include include/onnxruntime include/onnxruntime/core/session)
set(_apar_package libonnxruntime-dev)

function(apar_find_onnxruntime_headers directory_out reason_out)
  set(given "${ONNXRUNTIME_INCLUDE_DIR}")
  if(NOT given)
    set(given "$ENV{ONNXRUNTIME_INCLUDE_DIR}")
  endif()
  if(given)
    find_path(found ${_apar_header} PATHS "${given}" PATH_SUFFIXES ${_apar_header_folders} NO_DEFAULT_PATH NO_CACHE)
    if(NOT found)
      message(FATAL_ERROR "ONNXRUNTIME_INCLUDE_DIR is '${given}', but there is no ${_apar_header} in it.")
    endif()
  else()
    find_path(found ${_apar_header} PATH_SUFFIXES ${_apar_header_folders} NO_CACHE)
  endif()
  if(NOT found AND APAR_FETCH_HEADERS)
    _apar_fetch_headers("${CMAKE_BINARY_DIR}/onnxruntime-headers" why)
    find_path(found ${_apar_header} PATHS "${CMAKE_BINARY_DIR}/onnxruntime-headers/usr/include"
              PATH_SUFFIXES ${_apar_header_folders} NO_DEFAULT_PATH NO_CACHE)
  endif()
  if(found)
    file(STRINGS "${found}/${_apar_header}" version REGEX "^#define ORT_API_VERSION ")
    string(REGEX MATCH "[0-9]+" version "${version}")
    message(STATUS "apar: headers of ONNX Runtime, API ${version}: ${found}")
    set(${directory_out} "${found}" PARENT_SCOPE)
    set(${reason_out} "" PARENT_SCOPE)
  else()
    set(${directory_out} "" PARENT_SCOPE)
    set(${reason_out} "the headers of ONNX Runtime were not found${why}. Install them (on Debian 13 and later: \
apt-get install ${_apar_package}) or unpack a release of ONNX Runtime, set ONNXRUNTIME_INCLUDE_DIR to the folder \
that holds ${_apar_header}, and install apar again." PARENT_SCOPE)
  endif()
endfunction()

# Fetch the package into `folder` and unpack it there. Sets `why_out` to a half sentence where that fails.
function(_apar_fetch_headers folder why_out)
  set(${why_out} "" PARENT_SCOPE)
  if(EXISTS "${folder}/usr/include")
    return()
  endif()
  find_program(apt_get apt-get NO_CACHE)
  find_program(dpkg_deb dpkg-deb NO_CACHE)
  if(NOT apt_get OR NOT dpkg_deb)
    return()
  endif()
  # Lists, cache and sources of our own: works as any user and leaves the machine's package database alone.
  set(work "${folder}/apt")
  file(REMOVE_RECURSE "${folder}")
  file(MAKE_DIRECTORY "${work}/sources" "${work}/lists/partial" "${work}/cache/archives/partial")
  _apar_package_source("${work}/sources")
  set(apt "${apt_get}" -q
      -o "Dir::Etc::SourceList=/dev/null" -o "Dir::Etc::SourceParts=${work}/sources"
      -o "Dir::State::Lists=${work}/lists" -o "Dir::Cache=${work}/cache"
      -o "Acquire::Retries=1" -o "Acquire::http::Timeout=20" -o "Acquire::https::Timeout=20"
      -o "Acquire::Languages=none" -o "APT::Update::Error-Mode=any" -o "APT::Sandbox::User=root")
  message(STATUS "apar: fetching the headers of ONNX Runtime (${_apar_package}) through apt-get")
  set(log "${folder}.log")
  foreach(action "update" "download;${_apar_package}")
    execute_process(COMMAND ${apt} ${action} WORKING_DIRECTORY "${work}" TIMEOUT 120
                    OUTPUT_FILE "${log}" ERROR_FILE "${log}" RESULT_VARIABLE failed)
    if(failed)
      file(REMOVE_RECURSE "${folder}")
      list(GET action 0 verb)
      set(${why_out} " (apt-get ${verb} failed: ${failed}; see ${log})" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  file(GLOB archive "${work}/${_apar_package}_*.deb")
  execute_process(COMMAND "${dpkg_deb}" -x "${archive}" "${work}/unpacked" TIMEOUT 60
                  OUTPUT_FILE "${log}" ERROR_FILE "${log}" RESULT_VARIABLE failed)
  if(failed)
    set(${why_out} " (dpkg-deb could not unpack ${_apar_package}; see ${log})" PARENT_SCOPE)
  else()
    file(RENAME "${work}/unpacked/usr" "${folder}/usr")
  endif()
  file(REMOVE_RECURSE "${work}")
endfunction()

# Write the machine's first package source to `folder`: same host, components and signing key. Debian 12 and older lack
# the package, so Debian is asked for release 13; elsewhere the machine's own release is.
function(_apar_package_source folder)
  set(suite "")
  if(EXISTS "/etc/os-release")
    file(STRINGS "/etc/os-release" id REGEX "^ID=\"?debian\"?$")
    if(id)
      set(suite "trixie")
    endif()
  endif()
  file(GLOB candidates "/etc/apt/sources.list.d/debian.sources" "/etc/apt/sources.list.d/ubuntu.sources")
  foreach(candidate IN LISTS candidates)
    file(READ "${candidate}" text)
    string(REGEX REPLACE "(^|\n)#[^\n]*" "" text "${text}")
    string(REGEX REPLACE "^[\n]+" "" text "${text}")
    string(REGEX REPLACE "\n[ \t]*\n.*" "\n" text "${text}")
    if(suite)
      string(REGEX REPLACE "(^|\n)Suites:[^\n]*" "\\1Suites: ${suite}" text "${text}")
    endif()
    file(WRITE "${folder}/apar.sources" "${text}")
    return()
  endforeach()
  if(EXISTS "/etc/apt/sources.list")
    file(STRINGS "/etc/apt/sources.list" lines REGEX "^deb[ \t]")
    if(lines)
      list(GET lines 0 line)
      if(suite)
        # deb [options] URI suite component...
        string(REGEX REPLACE "^(deb[ \t]+(\\[[^]]*\\][ \t]+)?[^ \t]+[ \t]+)[^ \t]+" "\\1${suite}" line "${line}")
      endif()
      file(WRITE "${folder}/apar.list" "${line}\n")
    endif()
  endif()
endfunction()
