//! The engine: loads a plan's weights and runs its steps; sessions are timelines over it.
