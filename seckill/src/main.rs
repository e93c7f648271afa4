//! The one binary. See [`seckill::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    seckill::cli::main()
}
