// The log of calls and the rules of a stream capture; `dry_*` is what Python reads.
#include "log.h"

#include <pthread.h>

#include <mutex>
#include <set>
#include <vector>

namespace {

enum Mode { GLOBAL, THREAD_LOCAL, RELAXED };  // as cudaStreamCaptureMode

struct Entry {
  std::string kind, what;
  bool in_capture;
};

struct Capture {
  std::set<const void*> streams, events;  // empty outside a capture
  pthread_t thread;
  int mode = RELAXED;
  unsigned long long number = 0;
  size_t nodes = 0;
};

// Destroyed by nobody: torch calls CUDA until the process ends.
std::recursive_mutex& mutex = *new std::recursive_mutex;
std::vector<Entry>& entries = *new std::vector<Entry>;
Capture& capture = *new Capture;
thread_local int thread_mode = GLOBAL;

using Lock = std::lock_guard<std::recursive_mutex>;

}  // namespace

namespace dry {

void work(const char* kind, const std::string& what, const void* stream) {
  Lock lock(mutex);
  bool inside = captured(stream);
  entries.push_back({kind, what, inside});
  capture.nodes += inside;
}

void note(const char* kind, const std::string& what) {
  Lock lock(mutex);
  entries.push_back({kind, what, !capture.streams.empty()});
}

int refuse(const char* call) {
  note("illegal", call);
  return 900;
}

bool unsafe() {
  Lock lock(mutex);
  if (capture.streams.empty() || thread_mode == RELAXED || capture.mode == RELAXED) return false;
  return capture.mode == GLOBAL || pthread_equal(pthread_self(), capture.thread);
}

void* handle() {
  Lock lock(mutex);
  static size_t last = 0x1000;
  return reinterpret_cast<void*>(last += 16);
}

bool captured(const void* stream) {
  Lock lock(mutex);
  return capture.streams.count(stream);
}

void begin(const void* stream, int mode) {
  Lock lock(mutex);
  capture = {{stream}, {}, pthread_self(), mode, capture.number + 1, 0};
  note("capture", "begin");
}

size_t end() {
  Lock lock(mutex);
  note("capture", "end");
  capture.streams.clear();
  capture.events.clear();
  return capture.nodes;
}

unsigned long long capture_number() {
  Lock lock(mutex);
  return capture.number;
}

int exchange_mode(int mode) {
  int before = thread_mode;
  thread_mode = mode;
  return before;
}

void record_event(const void* event, const void* stream) {
  Lock lock(mutex);
  captured(stream) ? (void)capture.events.insert(event) : (void)capture.events.erase(event);
}

bool captured_event(const void* event) {
  Lock lock(mutex);
  return capture.events.count(event);
}

bool wait_for_event(const void* stream, const void* event) {
  Lock lock(mutex);
  // A stream that waits for a captured event joins the capture.
  if (captured_event(event)) capture.streams.insert(stream);
  return captured_event(event) || !captured(stream);
}

}  // namespace dry

extern "C" {

size_t dry_size() {
  Lock lock(mutex);
  return entries.size();
}

// Entry `i` as "kind \t 1 inside a capture, else 0 \t what"; valid until the next call of a thread.
const char* dry_entry(size_t i) {
  Lock lock(mutex);
  thread_local std::string line;
  const Entry& entry = entries[i];
  line = entry.kind + "\t" + (entry.in_capture ? "1" : "0") + "\t" + entry.what;
  return line.c_str();
}

void dry_note(const char* kind, const char* what) { dry::note(kind, what); }

void dry_clear() {
  Lock lock(mutex);
  entries.clear();
}
}
