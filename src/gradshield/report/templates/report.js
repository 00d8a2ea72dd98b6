(function () {
  "use strict";
  var specs = JSON.parse(document.getElementById("specs").textContent);
  var root = document.documentElement;
  var config = { displayModeBar: false, responsive: true, showTips: false, doubleClick: false };

  // Colours in the figures are CSS variables, so that one figure works in light, dark and print.
  function coloured(value, style) {
    if (typeof value === "string") {
      var name = /^var\((--[a-z]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map(function (entry) { return coloured(entry, style); });
    if (value && typeof value === "object") {
      var copy = {};
      Object.keys(value).forEach(function (key) { copy[key] = coloured(value[key], style); });
      return copy;
    }
    return value;
  }

  function draw(key) {
    var element = document.querySelector('[data-plot="' + key + '"]');
    var spec = coloured({ data: specs[key].data, layout: specs[key].layout }, getComputedStyle(root));
    var ranges = specs[key].ranges || {};
    Object.keys(ranges).forEach(function (axis) {
      spec.layout[axis].type = specs[key].log ? "log" : "linear";
      spec.layout[axis].range = ranges[axis][specs[key].log ? "log" : "linear"];
      // One tick per decade, or per row: counts have no fractions.
      if (specs[key].log || ranges[axis].linear[1] < 6) spec.layout[axis].dtick = 1;
    });
    Plotly.react(element, spec.data, spec.layout, config);
  }

  function drawAll() { Object.keys(specs).forEach(draw); }

  document.querySelectorAll("[data-log]").forEach(function (button) {
    var key = button.dataset.log;
    button.hidden = false;
    button.setAttribute("aria-pressed", String(Boolean(specs[key].log)));
    button.addEventListener("click", function () {
      specs[key].log = !specs[key].log;
      button.setAttribute("aria-pressed", String(specs[key].log));
      draw(key);
    });
  });

  document.querySelectorAll("[data-open]").forEach(function (button) {
    button.hidden = false;
    button.addEventListener("click", function () {
      var open = button.dataset.state !== "open";
      document.getElementById(button.dataset.open).querySelectorAll("details.group, details.row").forEach(
        function (entry) { entry.open = open || entry.classList.contains("group"); });
      button.dataset.state = open ? "open" : "";
      button.textContent = open ? "Close all rows" : "Open all rows";
    });
  });

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

  drawAll();
  document.addEventListener("specs", function (event) { specs = event.detail; drawAll(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  window.addEventListener("beforeprint", function () { root.dataset.theme = "light"; drawAll(); });
  window.addEventListener("afterprint", function () { delete root.dataset.theme; drawAll(); });
})();
