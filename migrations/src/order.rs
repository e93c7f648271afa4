//! order's schema: one row an order, as its buyer sees it.

use sea_orm_migration::prelude::*;

use crate::{Room, new_table};

/// Its migrations, oldest first.
#[derive(Debug)]
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Records), Box::new(Room { name: "m0002_order_room", table: "order_record" })]
    }

    fn migration_table_name() -> DynIden {
        "order_migrations".into_iden()
    }
}

#[derive(DeriveIden)]
enum OrderRecord {
    Table,
    OrderId,
    Buyer,
    SaleId,
    Quantity,
    Currency,
    Units,
    Nanos,
    State,
    RejectReason,
    CreateAt,
    ExpireAt,
    PayAt,
    CloseAt,
    Version,
    SagaVersion,
}

struct Records;

impl MigrationName for Records {
    fn name(&self) -> &str {
        "m0001_order_record"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Records {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = new_table(manager, OrderRecord::Table)
            // The order's one row (I10): a replayed creation meets it and changes nothing.
            .col(ColumnDef::new(OrderRecord::OrderId).string_len(32).not_null().primary_key())
            .col(ColumnDef::new(OrderRecord::Buyer).string_len(128).not_null())
            .col(ColumnDef::new(OrderRecord::SaleId).string_len(63).not_null())
            .col(ColumnDef::new(OrderRecord::Quantity).big_integer().not_null().check(Expr::cust("quantity > 0")))
            .col(ColumnDef::new(OrderRecord::Currency).string_len(3).not_null())
            .col(ColumnDef::new(OrderRecord::Units).big_integer().not_null().check(Expr::cust("units >= 0")))
            .col(ColumnDef::new(OrderRecord::Nanos).integer().not_null())
            // Numbers of seckill.v1.OrderState and seckill.internal.v1.Reason.
            .col(ColumnDef::new(OrderRecord::State).integer().not_null())
            .col(ColumnDef::new(OrderRecord::RejectReason).integer().not_null())
            .col(ColumnDef::new(OrderRecord::CreateAt).big_integer().not_null())
            .col(ColumnDef::new(OrderRecord::ExpireAt).big_integer().not_null())
            .col(ColumnDef::new(OrderRecord::PayAt).big_integer())
            .col(ColumnDef::new(OrderRecord::CloseAt).big_integer())
            .col(ColumnDef::new(OrderRecord::Version).big_integer().not_null())
            .col(ColumnDef::new(OrderRecord::SagaVersion).big_integer().not_null())
            .to_owned();
        manager.create_table(table).await?;
        // A buyer's orders, newest first, and the place where a page ends.
        let index = Index::create()
            .name("order_record_by_buyer")
            .table(OrderRecord::Table)
            .col(OrderRecord::Buyer)
            .col(OrderRecord::CreateAt)
            .to_owned();
        manager.create_index(index).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(OrderRecord::Table).to_owned()).await
    }
}
