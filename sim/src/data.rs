//! The services' real databases, in a run that holds time still: see [`at_once`].

use std::sync::OnceLock;

use anyhow::Context as _;
use mesh::testing::at_once;
use migrations::Service;
use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};

/// The services' databases: they outlive every crash of a role.
#[derive(Debug)]
pub struct Databases {
    pub stock: DatabaseConnection,
    pub order: DatabaseConnection,
    pub payment: DatabaseConnection,
    pub coordinator: DatabaseConnection,
}

impl Databases {
    /// Empty ones, in memory.
    pub fn open() -> anyhow::Result<Self> {
        Ok(Self {
            stock: open(Service::Stock)?,
            order: open(Service::Order)?,
            payment: open(Service::Payment)?,
            coordinator: open(Service::Coordinator)?,
        })
    }
}

impl Drop for Databases {
    /// Their threads end with the run, and not some time later.
    fn drop(&mut self) {
        for db in [&self.stock, &self.order, &self.payment, &self.coordinator] {
            // They are in memory: whatever is lost with them is lost anyway.
            let _ = at_once(db.close_by_ref());
        }
    }
}

/// Migrating takes a while; what it comes to is kept.
fn open(service: Service) -> anyhow::Result<DatabaseConnection> {
    static SCHEMAS: [OnceLock<String>; 4] = [const { OnceLock::new() }; 4];
    at_once(async {
        let db = mesh::sql::connect("sqlite::memory:").await?;
        let kept = &SCHEMAS[service as usize];
        if let Some(schema) = kept.get() {
            db.execute_unprepared(schema).await?;
            return Ok(db);
        }
        migrations::up(service, &db).await?;
        let written = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'";
        let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), written)).await?;
        let mut schema = String::new();
        for row in rows {
            schema.push_str(&row.try_get::<String>("", "sql")?);
            schema.push_str(";\n");
        }
        // Two threads may have migrated at the same time, to the same.
        let _ = kept.set(schema);
        anyhow::Ok(db)
    })
    .with_context(|| format!("the database of {}", service.name()))
}
