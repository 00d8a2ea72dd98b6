(function () {
  "use strict";
  // One search filters all tables: a defence has a row in many of them.
  var boxes = document.querySelectorAll("[data-filter]");
  boxes.forEach(function (box) {
    box.parentElement.hidden = false;
    box.addEventListener("input", function () {
      var wanted = box.value.trim().toLowerCase();
      boxes.forEach(function (other) { if (other !== box) other.value = box.value; });
      document.querySelectorAll("tr[data-name]").forEach(function (row) {
        row.hidden = wanted !== "" && row.dataset.name.indexOf(wanted) < 0;
      });
    });
  });

  function value(row, column) {
    var entry = row.cells[column];
    return entry.dataset.key === undefined ? NaN : Number(entry.dataset.key);
  }

  document.querySelectorAll("table[data-sorts]").forEach(function (table) {
    var body = table.tBodies[0];
    var first = Array.prototype.slice.call(body.rows);
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (head, column) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.textContent = "";
      head.appendChild(button);
      button.addEventListener("click", function () {
        var was = head.getAttribute("aria-sort");
        var now = was === "ascending" ? "descending" : was === "descending" ? null : "ascending";
        table.querySelectorAll("[aria-sort]").forEach(function (other) { other.removeAttribute("aria-sort"); });
        var rows = first.slice();
        if (now) {
          head.setAttribute("aria-sort", now);
          var turn = now === "ascending" ? 1 : -1;
          rows.sort(function (a, b) {
            var x = value(a, column), y = value(b, column);
            if (isNaN(x) && isNaN(y)) return turn * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
            return isNaN(x) ? 1 : isNaN(y) ? -1 : turn * (x - y); // missing values stay last
          });
        }
        rows.forEach(function (row) { body.appendChild(row); });
      });
    });
  });
})();
