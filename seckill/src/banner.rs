//! What `seckill` says when it is up: where it is, where the data lives, and a first thing to try.

use crate::{assembly::Mesh, config::StorageArgs};

/// Prints it to stdout.
pub fn print(mesh: &Mesh, storage: &StorageArgs) {
    let address = mesh.address;
    println!("seckill is up");
    println!("  gateway   http://{address}  (HTTP, gRPC, health, reflection; /openapi.json)");
    if let Some(admin) = mesh.admin {
        println!("  admin     http://{admin}  (/metrics /livez /readyz /version)");
    }
    if storage.is_embedded() {
        println!("  data      {}  (embedded: complete and durable on one machine)", storage.data_dir.display());
        println!("try         seckill token --sub alice --scope buyer --data-dir {}", storage.data_dir.display());
    }
    println!("            curl http://{address}/v1/sales");
}
