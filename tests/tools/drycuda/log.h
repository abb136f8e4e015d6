// What the files of the dry CUDA share: the log of calls, and the rules of a stream capture.
#pragma once
#include <string>

namespace dry {

// Log work of a stream: a node of the graph if the stream is captured.
void work(const char* kind, const std::string& what, const void* stream);
// Log anything else.
void note(const char* kind, const std::string& what);
// Log a call that a capture forbids; returns cudaErrorStreamCaptureUnsupported.
int refuse(const char* call);
// Whether the present thread is not allowed to make calls that may synchronize, such as cudaMalloc.
bool unsafe();
// A number that is used once, as a handle.
void* handle();

// The capture. There is one at a time.
bool captured(const void* stream);
void begin(const void* stream, int mode);
size_t end();  // returns the number of nodes
unsigned long long capture_number();
int exchange_mode(int mode);
void record_event(const void* event, const void* stream);
bool captured_event(const void* event);
bool wait_for_event(const void* stream, const void* event);  // false: not allowed

}  // namespace dry
