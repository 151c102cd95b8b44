# Reads sources, paths relative to the root. Outline: a line is stripped of comments and texts; includes are
# judged by the folder of the file; declarations at the left margin of headers by their names; calls that end
# the process by the function they stand in.

BEGIN {
  # the only order in which folders may include one another
  allowed["core"] = "core"
  allowed["kernels"] = "core kernels"
  allowed["comm"] = "core comm"
  allowed["data"] = "core data"
  allowed["checkpoint"] = "core comm checkpoint"
  allowed["trainer"] = "core kernels comm data checkpoint trainer"
  allowed["launcher"] = "core kernels comm data checkpoint trainer launcher"
  prefix["core"] = "core"; prefix["kernels"] = "kern"; prefix["comm"] = "comm"; prefix["data"] = "data"
  prefix["checkpoint"] = "ckpt"; prefix["trainer"] = "train"; prefix["launcher"] = "launch"
  # headers that are not of the C library, POSIX, Linux or the compiler, and the places that may see them
  third["cyaml/cyaml.h"] = "core"
  third["yaml.h"] = "core"
  third["xxhash.h"] = "core data checkpoint"
  third["oneapi/dnnl/dnnl.h"] = "kernels/cpu"
  third["dnnl.h"] = "kernels/cpu"
  third["mpi.h"] = "comm"
  third["nccl.h"] = "comm"
  third["hdf5.h"] = "data trainer"
  third["zlib.h"] = "data"
  third["libdeflate.h"] = "data"
  third["zstd.h"] = "data checkpoint"
  third["initializer_list"] = "kernels/cuda" # C++
  third["type_traits"] = "kernels/cuda"
  third["cJSON.h"] = "core comm data checkpoint trainer launcher"
  third["cjson/cJSON.h"] = "comm data checkpoint trainer launcher"
  split("assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign " \
    "stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar " \
    "wctype dirent dlfcn fcntl fnmatch ftw getopt glob libgen netdb omp poll pthread sched semaphore spawn strings " \
    "syslog termios unistd immintrin cpuid malloc execinfo", words, " ")
  for (i in words) system_header[words[i] ".h"] = 1
  # ways to end the process, and the only functions that may
  may_end["comm/comm.c exit"] = "comm_fail_stop"
  may_end["comm/comm.c _exit"] = "on_last_resort" # after a device that does not let go
  may_end["launcher/main.c exit"] = "main"
  may_end["comm/mpi_transport.c _Exit"] = "comm_mpi_abort_priv"
  may_end["comm/start_guard.c _exit"] = "watch" # MPI does not start
  may_end["core/stop.c _exit"] = "on_signal" # a second interrupt
  may_end["core/file.c _exit"] = "pass_gate" # an injected crash
}

function complain(text) {
  print FILENAME ":" FNR ": " text
}

function holds(list, word) {
  return index(" " list " ", " " word " ") > 0
}

FNR == 1 {
  count = split(FILENAME, part, "/")
  folder = part[1]
  place = count > 2 && part[1] == "kernels" ? part[1] "/" part[2] : part[1] # kernels/cpu, kernels/cuda
  owner = folder == "tests" ? part[2] : folder                            # whose *_impl.h it may see
  header = FILENAME ~ /\.h$/
  in_comment = 0
  inside = "" # the function that a line stands in
}

# the line without comments and without what stands in quotes
function strip(line,    out, at, c, two, quote) {
  out = ""
  quote = ""
  for (at = 1; at <= length(line); at++) {
    c = substr(line, at, 1)
    two = substr(line, at, 2)
    if (in_comment) {
      if (two == "*/") { in_comment = 0; at++ }
    } else if (quote != "") {
      if (c == "\\") at++
      else if (c == quote) { quote = ""; out = out c }
    } else if (two == "/*") {
      in_comment = 1
      at++
    } else if (two == "//") {
      break
    } else {
      if (c == "\"" || c == "'") quote = c
      out = out c
    }
  }
  return out
}

function judge_include(line,    name, target, kind) {
  kind = line ~ /</ ? "<" : "\""
  name = line
  sub(/^[ \t]*#[ \t]*include[ \t]*[<"]/, "", name)
  sub(/[>"].*/, "", name)
  if (name ~ /_impl\.h$/) {
    target = name ~ /\// ? name : FILENAME
    sub(/\/.*/, "", target)
    if (kind == "\"" && target != owner && target != folder)
      complain("includes " name ", which is private to " target)
  }
  if (folder == "tests") return
  if (kind == "\"") {
    target = folder
    if (name ~ /\//) {
      target = name
      sub(/\/.*/, "", target)
    }
    if (!holds(allowed[folder], target)) complain("includes " name "; " folder " may include " allowed[folder])
    return
  }
  if (name ~ /^(sys|linux|sanitizer|netinet|arpa)\// || name in system_header) return
  if (name ~ /^(cuda|cublas|cub\/|nvtx|mma\.h|cooperative_groups)/) {
    if (place != "kernels/cuda") complain("includes " name ", which belongs to kernels/cuda")
  } else if (!(name in third)) {
    complain("includes " name ", which is no header of the system and of no library that is used")
  } else if (!holds(third[name], place) && !holds(third[name], folder)) {
    complain("includes " name ", which belongs to " third[name])
  }
}

# names of functions and variables that a header gives to other folders; static helpers too
function judge_declaration(line,    name, want) {
  if (line !~ /^[A-Za-z_]/ || line ~ /^(typedef|struct|union|enum|extern "|else|return)([^A-Za-z_]|$)/) return
  gsub(/__attribute__|CORE_PRINTF|CORE_NODISCARD|_Noreturn|_Static_assert/, "", line)
  if (line ~ /^[ \t]*\(/) return
  name = line
  if (name ~ /\(/) {
    sub(/[ \t]*\(.*/, "", name)
  } else {
    if (line !~ /^extern /) return
    sub(/[ \t]*(\[.*)?;.*/, "", name)
  }
  if (name !~ /[ \t*]/) return # a macro's call
  sub(/.*[ \t*]/, "", name)
  want = prefix[folder] "_"
  if (name != "" && index(name, want) != 1) complain("declares " name "; names of " folder " begin with " want)
}

function judge_end(line,    word, rest) {
  rest = line
  while (match(rest, /(^|[^A-Za-z0-9_.>])(abort|exit|_exit|_Exit|quick_exit)[ \t]*\(/)) {
    word = substr(rest, RSTART, RLENGTH)
    rest = substr(rest, RSTART + RLENGTH)
    gsub(/[^A-Za-z_]/, "", word)
    if (inside == "" || may_end[FILENAME " " word] != inside)
      complain("calls " word "(); only comm_fail_stop and main end the process")
  }
}

{
  started_in_comment = in_comment
  code = strip($0)
  if (!started_in_comment && $0 ~ /^[ \t]*#[ \t]*include[ \t]*[<"]/) judge_include($0)
  if (folder == "tests") next
  if (code ~ /^[A-Za-z_].*\(/ && code !~ /;[ \t]*$/) {
    inside = code
    sub(/[ \t]*\(.*/, "", inside)
    sub(/.*[ \t*]/, "", inside)
  }
  if (code ~ /^}/) inside = ""
  if (header && FILENAME !~ /_impl\.h$/) judge_declaration(code)
  judge_end(code)
}
