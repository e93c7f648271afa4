//! The schemas: one migrator per service, on SQLite, PostgreSQL and MySQL/MariaDB.
//!
//! Invariants live here where a database can hold them: I1 as CHECK constraints, idempotency as unique keys. Every
//! service's tables begin with its own name and its migrations are counted in a table of its own, so that services may
//! share one database server, even one database, without sharing a table.

#![deny(missing_docs)]

use sea_orm::{DatabaseConnection, DbBackend};
use sea_orm_migration::{MigrationStatus, MigratorTrait, prelude::*};

pub mod coordinator;
pub mod order;
pub mod payment;
pub mod stock;

/// Whose schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Sales, ledger, holds, outbox.
    Stock,
    /// Order records.
    Order,
    /// Payments and the simulated provider.
    Payment,
    /// Sagas.
    Coordinator,
}

impl Service {
    /// All that own a database.
    pub const ALL: [Service; 4] = [Service::Stock, Service::Order, Service::Payment, Service::Coordinator];

    /// As flags, tables and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Service::Stock => "stock",
            Service::Order => "order",
            Service::Payment => "payment",
            Service::Coordinator => "coordinator",
        }
    }
}

/// Applies what is pending. Idempotent; run by one process at a time.
pub async fn up(service: Service, db: &DatabaseConnection) -> Result<(), sea_orm::DbErr> {
    match service {
        Service::Stock => stock::Migrator::up(db, None).await,
        Service::Order => order::Migrator::up(db, None).await,
        Service::Payment => payment::Migrator::up(db, None).await,
        Service::Coordinator => coordinator::Migrator::up(db, None).await,
    }
}

/// Every migration's name and whether it is applied. Reads only.
pub async fn status(service: Service, db: &DatabaseConnection) -> Result<Vec<(String, bool)>, sea_orm::DbErr> {
    let migrations = match service {
        Service::Stock => stock::Migrator::get_migration_with_status_read_only(db).await,
        Service::Order => order::Migrator::get_migration_with_status_read_only(db).await,
        Service::Payment => payment::Migrator::get_migration_with_status_read_only(db).await,
        Service::Coordinator => coordinator::Migrator::get_migration_with_status_read_only(db).await,
    }?;
    Ok(migrations.iter().map(|m| (m.name().to_owned(), m.status() == MigrationStatus::Applied)).collect())
}

/// A table to fill in. On MySQL/MariaDB its text is compared byte by byte: ids and buyers are case-sensitive there too.
pub(crate) fn new_table(manager: &SchemaManager<'_>, name: impl IntoTableRef) -> TableCreateStatement {
    let mut table = Table::create();
    table.table(name);
    // The other two do so anyway, and do not know the words.
    if manager.get_database_backend() == DbBackend::MySql {
        table.character_set("utf8mb4").collate(BYTE_BY_BYTE);
    }
    table
}

/// Has PostgreSQL fill a table's pages to a part only: a row's next state then finds room in its own page, and no index
/// that the change does not concern is written. Without, each change of a state writes the row's every index anew. For
/// tables whose rows change their states and whose indexes are not about states.
pub(crate) struct Room {
    pub(crate) name: &'static str,
    pub(crate) table: &'static str,
}

impl Room {
    async fn store(&self, manager: &SchemaManager<'_>, how: &str) -> Result<(), sea_orm::DbErr> {
        if manager.get_database_backend() != DbBackend::Postgres {
            return Ok(());
        }
        let change = format!("ALTER TABLE {} {how}", self.table);
        manager.get_connection().execute_unprepared(&change).await.map(drop)
    }
}

impl MigrationName for Room {
    fn name(&self) -> &str {
        self.name
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Room {
    async fn up(&self, manager: &SchemaManager) -> Result<(), sea_orm::DbErr> {
        self.store(manager, "SET (fillfactor = 50)").await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), sea_orm::DbErr> {
        self.store(manager, "RESET (fillfactor)").await
    }
}

/// The plain utf8mb4_bin pads with spaces, and "alice " would be served alice's orders (I11). The collation that does
/// not pad has a name of its own on each server, each in a comment that only that server executes.
const BYTE_BY_BYTE: &str = "/*M!100202 utf8mb4_nopad_bin */ /*!80017 utf8mb4_0900_bin */";
