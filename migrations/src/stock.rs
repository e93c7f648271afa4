//! stock's schema: sales with their ledger, holds, the outbox of refunds to the permits, and adjustments.

use sea_orm_migration::prelude::*;

use crate::{Room, new_table};

/// Its migrations, oldest first.
#[derive(Debug)]
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Ledger), Box::new(Room { name: "m0002_stock_room", table: "stock_hold" })]
    }

    fn migration_table_name() -> DynIden {
        "stock_migrations".into_iden()
    }
}

#[derive(DeriveIden)]
enum StockSale {
    Table,
    SaleId,
    RequestId,
    PayloadHash,
    Title,
    Description,
    ListCurrency,
    ListUnits,
    ListNanos,
    PriceCurrency,
    PriceUnits,
    PriceNanos,
    PerBuyerLimit,
    StartAt,
    EndAt,
    PaymentWindow,
    Verb,
    Version,
    CreateAt,
    CloseAt,
    Total,
    Available,
    Held,
    Sold,
    Persisted,
    Epoch,
    NextEpoch,
    ReleaseSeq,
}

#[derive(DeriveIden)]
enum StockHold {
    Table,
    HoldId,
    OrderId,
    SaleId,
    SaleBuyer,
    Buyer,
    Quantity,
    State,
    Refusal,
    GrantEpoch,
    ReleaseSeq,
    ExpireAt,
    CreateAt,
    UpdateAt,
}

#[derive(DeriveIden)]
enum StockOutbox {
    Table,
    Id,
    SaleId,
    Kind,
    HoldId,
    Buyer,
    Quantity,
    ReleaseSeq,
    GrantEpoch,
    CreateAt,
}

#[derive(DeriveIden)]
enum StockAdjustment {
    Table,
    RequestId,
    SaleId,
    Delta,
    CreateAt,
}

struct Ledger;

impl MigrationName for Ledger {
    fn name(&self) -> &str {
        "m0001_stock_ledger"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Ledger {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let number = |column: StockSale| ColumnDef::new(column).big_integer().not_null().to_owned();
        let sale = new_table(manager, StockSale::Table)
            .col(ColumnDef::new(StockSale::SaleId).string_len(63).not_null().primary_key())
            // A retried creation meets its own row; another payload under the same request is told by the hash.
            .col(ColumnDef::new(StockSale::RequestId).string_len(36).not_null().unique_key())
            .col(ColumnDef::new(StockSale::PayloadHash).string_len(64).not_null())
            .col(ColumnDef::new(StockSale::Title).string_len(200).not_null())
            .col(ColumnDef::new(StockSale::Description).text().not_null())
            .col(ColumnDef::new(StockSale::ListCurrency).string_len(3))
            .col(ColumnDef::new(StockSale::ListUnits).big_integer())
            .col(ColumnDef::new(StockSale::ListNanos).integer())
            .col(ColumnDef::new(StockSale::PriceCurrency).string_len(3).not_null())
            .col(number(StockSale::PriceUnits))
            .col(ColumnDef::new(StockSale::PriceNanos).integer().not_null())
            .col(number(StockSale::PerBuyerLimit))
            .col(number(StockSale::StartAt))
            .col(number(StockSale::EndAt))
            .col(number(StockSale::PaymentWindow))
            .col(ColumnDef::new(StockSale::Verb).integer().not_null())
            .col(number(StockSale::Version))
            .col(number(StockSale::CreateAt))
            // When an operator closed it; 0 when nobody did.
            .col(number(StockSale::CloseAt))
            .col(number(StockSale::Total))
            .col(number(StockSale::Available))
            .col(number(StockSale::Held))
            .col(number(StockSale::Sold))
            .col(number(StockSale::Persisted))
            .col(number(StockSale::Epoch))
            .col(number(StockSale::NextEpoch))
            .col(number(StockSale::ReleaseSeq))
            // I1, where no code can forget it.
            .check(Expr::cust("available >= 0"))
            .check(Expr::cust("held >= 0"))
            .check(Expr::cust("sold >= 0"))
            .check(Expr::cust("available + held + sold = total"))
            .to_owned();
        manager.create_table(sale).await?;
        // The sales that the loops look after.
        let index = Index::create().name("stock_sale_by_end").table(StockSale::Table).col(StockSale::EndAt).to_owned();
        manager.create_index(index).await?;

        let hold = new_table(manager, StockHold::Table)
            // A lock and the tombstone that forbids it race on this key, so that exactly one wins.
            .col(ColumnDef::new(StockHold::HoldId).string_len(32).not_null().primary_key())
            .col(ColumnDef::new(StockHold::OrderId).string_len(32).not_null())
            .col(ColumnDef::new(StockHold::SaleId).string_len(63).not_null())
            .col(ColumnDef::new(StockHold::SaleBuyer).string_len(192).not_null())
            .col(ColumnDef::new(StockHold::Buyer).string_len(128).not_null())
            .col(ColumnDef::new(StockHold::Quantity).big_integer().not_null().check(Expr::cust("quantity >= 0")))
            .col(ColumnDef::new(StockHold::State).integer().not_null())
            // Why a tombstone was refused: a number of seckill.internal.v1.Reason.
            .col(ColumnDef::new(StockHold::Refusal).integer().not_null())
            .col(ColumnDef::new(StockHold::GrantEpoch).big_integer().not_null())
            .col(ColumnDef::new(StockHold::ReleaseSeq).big_integer().not_null())
            .col(ColumnDef::new(StockHold::ExpireAt).big_integer().not_null())
            .col(ColumnDef::new(StockHold::CreateAt).big_integer().not_null())
            .col(ColumnDef::new(StockHold::UpdateAt).big_integer().not_null())
            .to_owned();
        manager.create_table(hold).await?;
        // The per-buyer limit (I7), checked under the sale's row lock.
        // What a buyer holds of a sale. One column on purpose: of (sale, buyer), PostgreSQL would use the sale alone as long
        // as it knows nothing of a new table, and look at every hold of the sale for every batch of buyers.
        let index =
            Index::create().name("stock_hold_by_buyer").table(StockHold::Table).col(StockHold::SaleBuyer).to_owned();
        manager.create_index(index).await?;
        // The snapshot that a rebuild reads. Without the state, which every release and deduct changes.
        let index = Index::create()
            .name("stock_hold_by_sale")
            .table(StockHold::Table)
            .col(StockHold::SaleId)
            .col(StockHold::HoldId)
            .to_owned();
        manager.create_index(index).await?;

        let outbox = new_table(manager, StockOutbox::Table)
            .col(ColumnDef::new(StockOutbox::Id).big_integer().not_null().auto_increment().primary_key())
            .col(ColumnDef::new(StockOutbox::SaleId).string_len(63).not_null())
            .col(ColumnDef::new(StockOutbox::Kind).integer().not_null())
            .col(ColumnDef::new(StockOutbox::HoldId).string_len(32).not_null())
            .col(ColumnDef::new(StockOutbox::Buyer).string_len(128).not_null())
            .col(ColumnDef::new(StockOutbox::Quantity).big_integer().not_null())
            .col(ColumnDef::new(StockOutbox::ReleaseSeq).big_integer().not_null())
            .col(ColumnDef::new(StockOutbox::GrantEpoch).big_integer().not_null())
            .col(ColumnDef::new(StockOutbox::CreateAt).big_integer().not_null())
            .to_owned();
        manager.create_table(outbox).await?;
        // Whether a sale's outbox is empty.
        let index =
            Index::create().name("stock_outbox_by_sale").table(StockOutbox::Table).col(StockOutbox::SaleId).to_owned();
        manager.create_index(index).await?;

        let adjustment = new_table(manager, StockAdjustment::Table)
            // Raised or lowered once, however often it is asked for.
            .col(ColumnDef::new(StockAdjustment::RequestId).string_len(36).not_null().primary_key())
            .col(ColumnDef::new(StockAdjustment::SaleId).string_len(63).not_null())
            .col(ColumnDef::new(StockAdjustment::Delta).big_integer().not_null())
            .col(ColumnDef::new(StockAdjustment::CreateAt).big_integer().not_null())
            .to_owned();
        manager.create_table(adjustment).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table(StockAdjustment::Table).to_owned()).await?;
        manager.drop_table(Table::drop().table(StockOutbox::Table).to_owned()).await?;
        manager.drop_table(Table::drop().table(StockHold::Table).to_owned()).await?;
        manager.drop_table(Table::drop().table(StockSale::Table).to_owned()).await
    }
}
