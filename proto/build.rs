//! Compiles the .proto files with protox, so that no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=protos");
    let files = [
        "seckill/v1/sales.proto",
        "seckill/v1/orders.proto",
        "seckill/v1/operations.proto",
        "seckill/internal/v1/common.proto",
        "seckill/internal/v1/stock.proto",
        "seckill/internal/v1/order.proto",
        "seckill/internal/v1/payment.proto",
        "seckill/internal/v1/coordinator.proto",
        "seckill/internal/v1/events.proto",
    ];
    let mut compiler = protox::Compiler::new(["protos"])?;
    compiler.include_source_info(true).include_imports(true).open_files(files)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Encoded by the compiler and not by prost: prost would drop the http annotations, which are extensions.
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure().bytes(".").include_file("mod.rs").compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
