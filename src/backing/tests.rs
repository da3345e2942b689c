//! Arenas of several parts, on the heap and on the real host.
