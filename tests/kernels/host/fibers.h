// Runs the threads of a block as fibers: each runs alone until a collective, where it waits for the others.
//
// Which thread runs next is a choice of the caller (Launch::order): a kernel with a missing barrier then gives
// different results. A thread that waits for one that does not come is an error, never a hang.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "switch.h"

namespace tcw_host {

struct Index {
    unsigned x, y, z;
};

enum : unsigned { FORWARD, REVERSE, SHUFFLED };

struct Site {
    const char* word;  // which collective
    const char* file;  // where in the source
    int line;
};

// The lanes that met: `data[lane]` is what each gave to meet().
struct Lanes {
    unsigned mask;
    void* data[32];
    bool has(unsigned lane) const { return mask >> lane & 1; }
};
using Finish = void (*)(Lanes&);

struct Copy {  // 16 bytes on their way to shared memory
    void* to;
    const void* from;
    unsigned group;
};

enum class State : uint8_t { READY, AT_WARP, AT_BARRIER, ENDED };

struct Thread {
    Fiber fiber;
    Index index;
    unsigned number;  // in the block
    State state;
    Site site;  // what it waits for
    unsigned mask;
    void* data;
    unsigned barriers;  // of the block that it has passed
    Mark came;          // to a barrier of its warp
    Mark* opened;       // such a barrier, by the thread that came last
    Mark group;         // of the threads that it let through
    unsigned groups;    // of copies that it has committed
    std::vector<Copy> copies;
};

constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned WARPS = MOST_THREADS / 32;
constexpr size_t STACK = 256 << 10;
constexpr unsigned SHARED_LIMIT = 99 << 10;
constexpr unsigned MARGIN = 1024;         // before and behind shared memory, looked at after each block
constexpr size_t PAGES = 64 << 10;        // a multiple of any processor's pages
constexpr size_t FENCE = 16 * PAGES;      // before and behind that, nobody may touch anything
constexpr size_t ROOM = 2 * PAGES;        // for shared memory and its margins
constexpr unsigned char POISON = 0xA5;
static_assert(SHARED_LIMIT + 2 * MARGIN <= ROOM, "shared memory has room");

static struct {
    Index thread, block, threads, blocks;
} here;
static Thread threads[MOST_THREADS];
static unsigned count;           // threads of a block
static unsigned order;           // FORWARD, REVERSE or SHUFFLED
static uint64_t random_state;    // of SHUFFLED
static unsigned ready[WARPS];    // lanes that can run
static unsigned at_warp[WARPS];  // lanes that wait in meet()
static Thread* current;          // the thread that runs; null in the scheduler
static Fiber scheduler;
static Mark block_begins, block_ends, barriers[2];  // two: a thread may be at the next one before all have left
static const char* kernel;
static void (*body)(void**);
static void** arguments;
static char* message;  // what went wrong; empty as long as nothing did
static size_t message_size;

extern "C" {
__attribute__((used, visibility("hidden"), aligned(PAGES))) unsigned char tcw_arena[FENCE + ROOM + FENCE];
// Where the library keeps variables that kernels call __shared__, as offsets from tcw_arena; build.py fills it in.
struct TcwVariable {
    int64_t offset;
    uint64_t size;
};
__attribute__((visibility("default"))) TcwVariable tcw_variables[256];
}
// The array that kernels call `shared`.
asm(".globl shared\n.hidden shared\n.set shared, tcw_arena + 0x100400\n");
static_assert(FENCE + MARGIN == 0x100400, "`shared` is behind the fence and a margin");
static unsigned char* const dynamic = tcw_arena + FENCE + MARGIN;

static inline unsigned lane() { return current->number & 31; }

static const char* base(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// Say what went wrong, unless something did before.
__attribute__((format(printf, 2, 0))) static void say_list(const Thread* thread, const char* format, va_list list) {
    if (message[0]) return;
    const Index b = here.block;
    int n = snprintf(message, message_size, "kernel %s, block (%u, %u, %u)", kernel, b.x, b.y, b.z);
    if (thread) {
        const Index t = thread->index;
        n += snprintf(message + n, message_size - n, ", thread (%u, %u, %u)", t.x, t.y, t.z);
    }
    n += snprintf(message + n, message_size - n, ": ");
    vsnprintf(message + n, message_size - n, format, list);
}

__attribute__((format(printf, 2, 3))) static void say(const Thread* thread, const char* format, ...) {
    va_list list;
    va_start(list, format);
    say_list(thread, format, list);
    va_end(list);
}

__attribute__((noinline)) static void wait() {
    Thread& me = *current;
    switch_fiber(me.fiber, scheduler, scheduler);
}

// End the launch with an error; a thread calls it, and it does not return.
__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    say_list(current, format, list);
    va_end(list);
    wait();
    __builtin_unreachable();
}

static unsigned warp_mask(unsigned warp) {
    const unsigned left = count - 32 * warp;
    return left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1;
}

static bool same(const Site& a, const Site& b) {
    return a.line == b.line && !strcmp(a.word, b.word) && (a.file == b.file || !strcmp(a.file, b.file));
}

// All lanes of `mask` wait: if it is for each other, do what the collective does and let them run.
static void complete(Thread* lane0, const Site& site, unsigned mask, Finish finish, bool orders) {
    Lanes lanes = {mask, {}};
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        const unsigned i = __builtin_ctz(rest);
        const Thread& other = lane0[i];
        if (other.mask != mask || !same(other.site, site)) return;
        lanes.data[i] = other.data;
    }
    finish(lanes);
    for (unsigned rest = mask; rest && orders; rest &= rest - 1) acquire(lane0[__builtin_ctz(rest)].came);
    if (orders) release(current->group);
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        Thread& other = lane0[__builtin_ctz(rest)];
        other.state = State::READY;
        other.opened = &current->group;
    }
    ready[lane0->number / 32] |= mask;
    at_warp[lane0->number / 32] &= ~mask;
}

// Wait until all lanes of `mask` are here. The last one to come does what the collective does, for all of them.
// If it `orders`, what each did to memory before is seen by the others after.
__attribute__((noinline)) static void meet(Site site, unsigned mask, void* data, Finish finish, bool orders = false) {
    const Unwatched unwatched;
    Thread& me = *current;
    const unsigned warp = me.number / 32;
    const char* file = base(site.file);
    if (!(mask >> lane() & 1))
        fail("%s (%s:%d): mask %08x lacks lane %u, which calls it", site.word, file, site.line, mask, lane());
    if (mask & ~warp_mask(warp))
        fail("%s (%s:%d): mask %08x names lanes that the block lacks", site.word, file, site.line, mask);
    me.site = site;
    me.mask = mask;
    me.data = data;
    me.state = State::AT_WARP;
    if (orders) release(me.came);
    at_warp[warp] |= 1u << lane();
    if ((at_warp[warp] & mask) == mask) complete(threads + 32 * warp, site, mask, finish, orders);
    wait();
    if (orders) acquire(*me.opened);
}

__attribute__((noinline)) static void barrier(Site site) {
    Thread& me = *current;
    Mark& mark = barriers[me.barriers++ % 2];
    me.site = site;
    me.state = State::AT_BARRIER;
    release(mark);
    wait();
    acquire(mark);
}

static void begin() {
    arrived(current->fiber, scheduler);
    acquire(block_begins);
    body(arguments);
    current->state = State::ENDED;
    release(block_ends);
    wait();
    __builtin_unreachable();
}

static unsigned random_below(unsigned n) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((random_state >> 32) * n >> 32);
}

static unsigned pick_bit(unsigned bits) {
    if (order == FORWARD) return __builtin_ctz(bits);
    if (order == REVERSE) return 31 - __builtin_clz(bits);
    for (unsigned skip = random_below(__builtin_popcount(bits)); skip; --skip) bits &= bits - 1;
    return __builtin_ctz(bits);
}

// Run each ready thread of a warp once, up to its next collective.
static void run_warp(unsigned warp) {
    unsigned now = ready[warp];
    ready[warp] = 0;
    while (now && !message[0]) {
        const unsigned i = pick_bit(now);
        now &= ~(1u << i);
        current = threads + 32 * warp + i;
        here.thread = current->index;
        switch_fiber(scheduler, current->fiber, scheduler);
        current = nullptr;
    }
}

// The warp to run next, or -1. A warp runs on as far as it can; in a shuffle it is now and then overtaken.
static int pick_warp(unsigned before) {
    if (ready[before] && (order != SHUFFLED || random_below(4))) return static_cast<int>(before);
    unsigned bits = 0;
    for (unsigned w = 0; w < (count + 31) / 32; ++w) bits |= static_cast<unsigned>(ready[w] != 0) << w;
    return bits ? static_cast<int>(pick_bit(bits)) : -1;
}

// Nobody can run on: name a thread that waits, and one that it waits for.
static void explain(const Thread& waiting, const Thread& other) {
    const auto describe = [](const Thread& t, char (&text)[256]) {
        const Site& s = t.site;
        if (t.state == State::ENDED) {
            snprintf(text, sizeof text, "has ended");
        } else if (t.state == State::AT_BARRIER) {
            snprintf(text, sizeof text, "waits at %s (%s:%d)", s.word, base(s.file), s.line);
        } else {
            snprintf(text, sizeof text, "waits at %s (%s:%d, mask %08x)", s.word, base(s.file), s.line, t.mask);
        }
    };
    char first[256], second[256];
    describe(waiting, first);
    describe(other, second);
    const Index o = other.index;
    say(&waiting, "%s for thread (%u, %u, %u), which %s", first, o.x, o.y, o.z, second);
}

// All threads wait or have ended: true if the block's barrier opens; false if it is done, or cannot go on.
static bool open_barrier() {
    const Thread* waiting = nullptr;
    for (unsigned i = 0; i < count; ++i) {
        const Thread& t = threads[i];
        if (t.state == State::AT_BARRIER && !waiting) waiting = &t;
        for (unsigned rest = t.state == State::AT_WARP ? t.mask : 0; rest; rest &= rest - 1) {
            const Thread& other = threads[(i & ~31u) + __builtin_ctz(rest)];
            if (other.state == State::AT_WARP && other.mask == t.mask && same(other.site, t.site)) continue;
            explain(t, other);
            return false;
        }
    }
    if (!waiting) return false;
    for (unsigned i = 0; i < count; ++i) {
        if (threads[i].state == State::AT_BARRIER && same(threads[i].site, waiting->site)) continue;
        explain(*waiting, threads[i]);
        return false;
    }
    for (unsigned i = 0; i < count; ++i) threads[i].state = State::READY;
    for (unsigned w = 0; w < (count + 31) / 32; ++w) ready[w] = warp_mask(w);
    return true;
}

}  // namespace tcw_host
