//! Domains that are saved and restored: while they run, on every engine, and with states that somebody else has written.

mod guest;
mod hostile;
mod lives;
mod parts;
